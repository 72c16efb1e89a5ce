"""A `Store` as one of Zarr's, for reading: so that retries, credentials and errors are ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as AbstractStore

from scoreray.data.storage.store import NotFound, Store

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype


class ZarrStore(AbstractStore):
    supports_writes, supports_deletes, supports_listing = False, False, True

    def __init__(self, store: Store) -> None:
        super().__init__(read_only=True)
        self.store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrStore) and other.store == self.store

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except NotFound:
            return None
        return prototype.buffer.from_bytes(data)

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes:
        if isinstance(wanted, RangeByteRequest):
            return self.store.get(key, wanted.start, wanted.end)
        if isinstance(wanted, OffsetByteRequest):
            return self.store.get(key, wanted.offset)
        if isinstance(wanted, SuffixByteRequest):
            return self.store.get(key, max(0, self.store.size(key) - wanted.suffix))
        return self.store.get(key)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, one) for key, one in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.store.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("is for reading")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("is for reading")

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key, _ in await asyncio.to_thread(self.store.list, prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        within = f"{prefix.rstrip('/')}/" if prefix else ""
        names = {key[len(within) :].partition("/")[0] for key, _ in await asyncio.to_thread(self.store.list, within)}
        for name in sorted(names):
            yield name
