"""Idempotency keys in Redis, for a service whose processes are on several machines: see `key_store.py`.

The server is the one that Ray's GCS fault tolerance needs already. Each method is one Lua script, which Redis runs
whole: no other client sees half of it, and a client that dies has run all of it or nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scoreray.sampling.service.config import Limits
from scoreray.sampling.service.key_store import LEASE_S, OVERHEAD_BYTES, KeyEntry, StoreLost, facts, key_reused
from scoreray.sampling.service.request import Claim, Completed, Origin

PREFIX = "{scoreray}:"  # braces: all keys in one slot, as a script may only touch one where Redis is a cluster
WITHIN_S = 5.0

# KEYS: all keys by their begin, those with an answer by their begin, bytes of each answer, bytes of all answers
COMMON = """
local ages, answered, sizes, total = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function let_answer_go(name)
    local bytes = redis.call('HGET', sizes, name)
    if bytes then
        redis.call('DECRBY', total, bytes)
        redis.call('HDEL', sizes, name)
        redis.call('ZREM', answered, name)
        redis.call('HDEL', name, 'body', 'facts')
    end
end
local function forget(names)
    for _, name in ipairs(names) do
        let_answer_go(name)
        redis.call('ZREM', ages, name)
        redis.call('DEL', name)
    end
end
"""

BEGIN = """
local name, fingerprint, owner, origin, instead_of = KEYS[5], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local lease_ms, remember_ms, remember_keys = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
forget(redis.call('ZRANGEBYSCORE', ages, '-inf', '(' .. (now - remember_ms)))
local known = redis.call('HMGET', name, 'fingerprint', 'origin', 'owner', 'lease', 'facts', 'body')
if not known[1] then
    redis.call('HSET', name, 'fingerprint', fingerprint, 'origin', origin, 'owner', owner, 'lease', now + lease_ms)
    redis.call('PEXPIRE', name, remember_ms)
    redis.call('ZADD', ages, now, name)
    forget(redis.call('ZRANGE', ages, 0, -remember_keys - 1))
    return {'mine', origin}
end
if known[1] ~= fingerprint then return {'reused'} end
if known[6] then return {'answered', known[2], known[5], known[6]} end
if known[3] ~= owner and tonumber(known[4]) > now then return {'drawn elsewhere', known[2]} end
if known[2] == instead_of then known[2] = origin end
redis.call('HSET', name, 'owner', owner, 'lease', now + lease_ms, 'origin', known[2])
return {'mine', known[2]}
"""

RENEW = """
if redis.call('HGET', KEYS[5], 'owner') == ARGV[1] then
    redis.call('HSET', KEYS[5], 'lease', now + tonumber(ARGV[2]))
end
"""

FINISH = """
local name, billed = KEYS[5], KEYS[6]
local facts, body, num_bytes, remember_bytes = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local known = redis.call('HMGET', name, 'fingerprint', 'billed', 'facts', 'body')
if known[4] then return {known[3], known[4]} end
if not known[2] then redis.call('HINCRBY', billed, ARGV[5], ARGV[6]) end
if not known[1] then return {} end
redis.call('HSET', name, 'billed', '1', 'lease', 0, 'facts', facts, 'body', body)
redis.call('ZADD', answered, redis.call('ZSCORE', ages, name) or now, name)
redis.call('HSET', sizes, name, num_bytes)
local held = redis.call('INCRBY', total, num_bytes)
while held > remember_bytes do
    let_answer_go(redis.call('ZRANGE', answered, 0, 0)[1])
    held = tonumber(redis.call('GET', total))
end
return {}
"""


class RedisKeyStore:
    """Keys in a Redis that all processes of a service reach, and that they share with Ray's GCS.

    While KubeRay replaces one Ray cluster by another both share their keys, and each counts the rows that it bills: the
    sum over both stays true. Time is that of Redis, the same for all.
    """

    def __init__(self, url: str, password: str | None, limits: Limits) -> None:
        self._limits = limits
        once = Retry(NoBackoff(), 1)  # a pooled connection that a new start of Redis cut; all scripts may be repeated
        times = {"socket_timeout": WITHIN_S, "socket_connect_timeout": WITHIN_S}
        self._redis = redis.Redis.from_url(url, password=password, retry=once, **times)
        self._begin, self._renew, self._finish = (
            self._redis.register_script(COMMON + script) for script in (BEGIN, RENEW, FINISH)
        )
        self._shared = [PREFIX + name for name in ("ages", "answered", "sizes", "bytes")]
        self._billed = f"{PREFIX}billed:{os.environ.get('RAY_CLUSTER_NAME', '')}"  # KubeRay sets it in each pod

    def begin(self, claim: Claim, origin: Origin, instead_of: Origin | None = None) -> KeyEntry:
        limits = self._limits
        origins = (json.dumps(origin), json.dumps(instead_of))
        bounds = (_ms(LEASE_S), _ms(limits.remember_s), limits.remember_keys)
        with _reached():
            state, *rest = self._begin(
                [*self._shared, _name(claim)], [claim.fingerprint, claim.owner, *origins, *bounds]
            )
        if state == b"reused":
            raise key_reused()
        made_from = Origin(*json.loads(rest[0]))
        if state == b"answered":
            return KeyEntry(made_from, answer=Completed(rest[2], *json.loads(rest[1])))
        return KeyEntry(made_from, mine=state == b"mine")

    def renew(self, claim: Claim) -> None:
        with _reached():
            self._renew([*self._shared, _name(claim)], [claim.owner, _ms(LEASE_S)])

    def finish(self, claim: Claim, answer: Completed, num_rows: int) -> Completed:
        num_bytes = len(answer.body) + OVERHEAD_BYTES
        values = (facts(answer), answer.body, num_bytes, self._limits.remember_bytes, f"{claim.token}\n", num_rows)
        with _reached():
            first = self._finish([*self._shared, _name(claim), self._billed], values)
        return Completed(first[1], *json.loads(first[0])) if first else answer

    def bill(self, source: str, num_rows: Mapping[str, int]) -> dict[str, int]:
        with _reached(), self._redis.pipeline(transaction=True) as both:
            if num_rows:
                both.hset(self._billed, mapping={f"{token}\n{source}": rows for token, rows in num_rows.items()})
            both.hgetall(self._billed)
            *_, fields = both.execute()
        totals: dict[str, int] = {}
        for field, rows in fields.items():
            token = field.decode().rpartition("\n")[0]
            totals[token] = totals.get(token, 0) + int(rows)
        return totals

    def close(self) -> None:
        self._redis.close()


def _name(claim: Claim) -> str:
    return f"{PREFIX}key:{claim.token}\n{claim.key}"


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise StoreLost(f"Redis: {type(error).__name__}: {error}") from error
