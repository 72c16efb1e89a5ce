"""Samples of a WebDataset tar that somebody else made: image, class and the members that fields ask for.

Other members are counted by kind.

A sample's key is its members' name up to the first dot, as WebDataset reads it. Where no member of a key is just a
picture (`img_0.05.png`, `img_0.10.png`), the names are taken to have dots in them, and the key goes to the last one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import DataError
from scoreray.data.reading.allowlist import JSON, LABELS, MAX_JSON_BYTES, json_value
from scoreray.data.reading.decode import decode_class
from scoreray.data.reading.pictures import IMAGE_SUFFIXES
from scoreray.data.reading.tars import Member, Tape, key_and_kind, members
from scoreray.data.sources.listing import is_hidden

PICTURES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
IMAGES = (*PICTURES, "npy")
LABEL_KEYS = ("label", "class", "cls", "target", "class_label", "class_id", "label_id", "class_index", "y")  # of JSON
MAX_LABEL_BYTES = 64
MAX_HELD_BYTES = 32 << 20  # of images whose key is not known yet
MAX_KINDS, MAX_KIND = 100, 64  # that are counted apart, and characters of one
NOTHING: Mapping[str, frozenset[str]] = {}
KEPT = (*IMAGES, *LABELS, JSON)  # kinds of a sample's own members that are looked at


class TarSample(NamedTuple):
    """`image` is None where `problem` says why it can't be used. `label`: the class's number, -1 for none. `members`:
    those that fields ask for, by their extensions; `kinds`: extensions of all; `offset`: of the first member."""

    key: str
    image: Member | None
    label: int = NO_CLASS
    problem: str = ""
    members: Mapping[str, Member] = {}
    offset: int = 0
    kinds: tuple[str, ...] = ()

    def member(self) -> Member:
        """The image. Raises DataError where there is none."""
        if self.image is None:
            raise DataError(self.problem)
        return self.image


class TarSamples:
    """Iterates over the samples of a tar. `unused` counts the members that are no image and no class, by kind.

    labelled: classes are read.  otherwise: how to do without them, for messages.
    wanted: extensions of members that fields ask for, `txt` or `t5.npy`, and the keys at the top of JSON that they
    read; none for all of it.  takes_image: a sample has one more member, its image: a picture, or without one an array.

    Raises DataError for what no tar of samples can hold, with its offset.
    """

    def __init__(
        self,
        tape: Tape,
        labelled: bool = True,
        otherwise: str = "--no-classes packs without classes",
        wanted: Mapping[str, frozenset[str]] = NOTHING,
        takes_image: bool = True,
    ) -> None:
        self._tape, self._labelled, self._otherwise, self._wanted = tape, labelled, otherwise, wanted
        self._takes_image, self._whole_kinds = takes_image, frozenset([*IMAGES, *wanted])
        self._wanted_endings = tuple(f".{kind}" for kind in wanted)
        self.left_out: Counter[str] = Counter()
        self._seen: dict[str, set[bytes]] = {"key": set(), "dotted": set(), "stem": set()}

    def __iter__(self) -> Iterator[TarSample]:
        key, group, held_bytes = "", dict[str, Member](), 0  # neighbours with the same key, by what follows its dot
        for member in members(self._tape):
            its_key, kind = key_and_kind(member.name)
            if is_hidden(f"{its_key}.{kind}" if kind else its_key):
                self._count("hidden file")
                continue
            kind = kind.lower()
            if its_key != key:
                yield from self._samples(key, group)
                key, group, held_bytes = its_key, {}, 0
            elif held_bytes > MAX_HELD_BYTES and not self._is_one_sample(group):
                group = yield from self._all_but_the_last(key, group)
                held_bytes = sum(len(kept.data) for kept in group.values())
            if kind in group:
                raise DataError(f"{member.place} comes twice")
            group[kind] = self._kept(member, kind)
            held_bytes += len(group[kind].data)
            if held_bytes > MAX_HELD_BYTES and self._is_one_sample(group):
                group = {kind: self._kept(member, kind if kind in KEPT else "") for kind, member in group.items()}
                held_bytes = 0  # the image is known, others are only counted
        yield from self._samples(key, group)

    def _samples(self, key: str, group: dict[str, Member]) -> Iterator[TarSample]:
        if not group:
            return
        at = next(iter(group.values())).offset
        dotted = None if self._is_one_sample(group) else _by_last_dot(group, self._wanted)
        if self._was_seen(key, "dotted" if dotted else "key"):
            raise DataError(f"byte {at}: sample '{_name(key)}' comes twice, or its members are not side by side")
        for stem, found in (dotted or {"": group}).items():
            whole = f"{key}.{stem}" if stem else key
            if dotted and self._is_again(whole):
                raise DataError(f"byte {at}: sample '{_name(whole)}' comes twice, or its members are not side by side")
            yield self._sample(whole, found)

    def _all_but_the_last(self, key: str, group: dict[str, Member]) -> Generator[TarSample, None, dict[str, Member]]:
        """Of names with dots that share their first part (`frame.0001.png`, ...) all in a tar may have the same key.
        Returns the members of the sample that may not be whole yet."""
        dotted = _by_last_dot(group, self._wanted)
        if dotted is None:
            at = next(iter(group.values())).offset
            raise DataError(f"byte {at}: sample '{_name(key)}' has over {MAX_HELD_BYTES:,} bytes of images")
        last = next(reversed(dotted))
        kept = {id(member) for member in dotted[last].values()}
        yield from self._samples(key, {kind: member for kind, member in group.items() if id(member) not in kept})
        return {kind: member for kind, member in group.items() if id(member) in kept}

    def _is_one_sample(self, group: Mapping[str, Member]) -> bool:
        """Whether a member's kind is all that follows its name's first dot: then so it is of the others."""
        return not self._whole_kinds.isdisjoint(group)

    def _kept(self, member: Member, kind: str) -> Member:
        """The member with the bytes that may be looked at."""
        return member if kind in self._wanted or kind.endswith(self._wanted_endings) else _kept(member, kind)

    def _was_seen(self, key: str, how: str) -> bool:
        """A key may come again only where its names have dots in them, as their order is another one then."""
        hashed, kinds = _hashed(key), ("key",) if how == "dotted" else ("key", "dotted")
        again = any(hashed in self._seen[kind] for kind in kinds)
        self._seen[how].add(hashed)
        return again

    def _is_again(self, stem: str) -> bool:
        hashed, seen = _hashed(stem), self._seen["stem"]
        again = hashed in seen
        seen.add(hashed)
        return again

    def _sample(self, key: str, found: dict[str, Member]) -> TarSample:
        at, wanted = next(iter(found.values())).offset, {kind: found[kind] for kind in found if kind in self._wanted}
        images = [kind for kind in found if kind in IMAGES and kind not in wanted] if self._takes_image else []
        if self._wanted:
            images = [kind for kind in images if kind in PICTURES] or images
        problem = _not_one(key, found, images) if self._takes_image and len(images) != 1 else ""
        if problem and (images or not self._wanted):
            return TarSample(key, None, problem=problem)
        try:
            label, used, field = self._label(found) if self._labelled else (NO_CLASS, set(), None)
        except DataError as error:
            return TarSample(key, None, problem=f"{error}; {self._otherwise}")
        taken = {*used, *wanted, *images}
        for kind in (kind for kind in found if kind not in taken):
            self._count(f".{kind}" if kind else "no suffix")
        read = self._wanted.get(JSON, frozenset() if JSON in used else None)
        if JSON in found and read is not None and (read or JSON not in wanted):
            for other in (other for other in _fields(found[JSON].data) if other not in read and other != field):
                self._count(f".{JSON}.{other[:32]}" if other.isprintable() else f".{JSON}")
        return TarSample(key, found[images[0]] if images else None, label, problem, wanted, at, tuple(found))

    def _label(self, found: dict[str, Member]) -> tuple[int, set[str], str | None]:
        """(the class's number, the kinds of the members that say so, the field of JSON that does). The first of LABELS
        that is there wins, and JSON comes last; others that say the same are no loss, and others are counted."""
        said = {kind: _number(found[kind].data, found[kind]) for kind in LABELS if kind in found}
        fields = _fields(found[JSON].data) if JSON in found else {}
        key = _label_key(fields) if fields else None
        if key is not None:
            said[JSON] = _number(fields[key], found[JSON], f"{key}: ")
        label = next(iter(said.values()), NO_CLASS)
        used = {kind for kind, number in said.items() if number == label}
        return label, used, key if JSON in used else None

    def _count(self, kind: str) -> None:
        kind = kind[:MAX_KIND]
        self.left_out[kind if kind in self.left_out or len(self.left_out) < MAX_KINDS else "others"] += 1


def sample_members(near: Iterable[Member], image_offset: int) -> tuple[str, dict[str, bytes]]:
    """(key, bytes of its members by kind) of the sample whose image begins at `image_offset`, out of the members near
    it in the tar; grouped by the rules of TarSamples. Raises DataError where the image is not among them."""
    split = [(member, *key_and_kind(member.name)) for member in near]
    image = next(((key, kind) for member, key, kind in split if member.offset == image_offset), None)
    if image is None:
        raise DataError(f"byte {image_offset}: no member begins where the index says; pack the data set again")
    key, kind = image
    stem = kind.rpartition(".")[0]  # of a name with dots in it, whose key goes up to the last one
    found = {}
    for member, its_key, its_kind in split:
        if its_key == key:
            if its_kind.startswith(f"{stem}."):
                its_kind = its_kind.removeprefix(f"{stem}.")
            elif stem and "." in its_kind:
                continue  # another sample's of the same first part
            found[its_kind.lower()] = member.data
    return f"{key}.{stem}" if stem else key, found


def _by_last_dot(found: Mapping[str, Member], wanted: Iterable[str]) -> dict[str, dict[str, Member]] | None:
    """Members by what is before their kind, where each of these has one image; None where one has not.

    A single image takes what has nothing before its kind too: `x.rgb.png` and `x.cls` are one sample.
    """
    stems: dict[str, dict[str, Member]] = {}
    usual = sorted({*wanted, *IMAGES, *LABELS, JSON}, key=len, reverse=True)
    for kind, member in found.items():
        known = next((one for one in usual if kind == one or kind.endswith(f".{one}")), kind.rpartition(".")[2])
        stems.setdefault(kind.removesuffix(known).removesuffix("."), {})[known] = member
    with_image = [stem for stem, members in stems.items() if any(kind in IMAGES for kind in members)]
    if len(with_image) == 1 and stems.keys() - with_image == {""}:
        shared = stems.pop("")
        stems[with_image[0]] = {**shared, **stems[with_image[0]]}
    one_each = all(sum(kind in IMAGES for kind in members) == 1 for members in stems.values())
    return stems if stems and one_each else None


def _image_kind(kind: str) -> str | None:
    """The image's kind at the end of a member's: png of png and of 0.05.png."""
    last = kind.rpartition(".")[2]
    return last if last in IMAGES else None


def _not_one(key: str, found: dict[str, Member], images: list[str]) -> str:
    first, name = next(iter(found.values())), _name(key)
    if images:
        how = " ".join(f"--field {_field_name(kind, images)}={kind}" for kind in images)
        return (
            f"byte {first.offset}: sample '{name}' has two images (.{', .'.join(images)}); keep one of them, or pack "
            f"them as fields: scoreray data pack SOURCE URL {how}"
        )
    others = sorted(kind for kind in found if _image_kind(kind))
    if others:
        shown = ", ".join([f"'{name}.{kind}'" for kind in others[:3]] + ["..."] * (len(others) > 3))
        return (
            f"byte {first.offset}: sample '{name}' has no image of its own, but {shown}; one of them needs the name "
            f"'{name}.{_image_kind(others[0])}'"
        )
    return f"byte {first.offset}: sample '{name}' has no image ({', '.join(IMAGES)})"


def _field_name(kind: str, images: list[str]) -> str:
    """A name for one of several images: `array`, `image` for the first picture, and of others their kind."""
    pictures = [one for one in images if one in PICTURES]
    return "array" if kind not in PICTURES else "image" if kind == pictures[0] else kind


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of a JSON member; none where it is no object, or not JSON."""
    try:
        found = json_value(data, "")
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}


def _label_key(fields: dict[str, Any]) -> str | None:
    """The field that says the class: a number before a word. Lists, true, 0.5 and null say none."""
    words = [key for key in LABEL_KEYS if isinstance(fields.get(key), str)]
    numbers = [key for key in LABEL_KEYS if _is_whole(fields.get(key))]
    return next(iter([*numbers, *(key for key in words if fields[key].isdecimal()), *words]), None)


def _is_whole(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: bytes | str | float, member: Member, key: str = "") -> int:
    if not isinstance(value, (bytes, str)):
        if value == NO_CLASS:
            return NO_CLASS
        value = str(int(value))
    try:
        return decode_class(value if isinstance(value, bytes) else value.encode(errors="replace"))
    except DataError as error:
        raise DataError(f"{member.place}: {key}{error}") from None


def _kept(member: Member, kind: str) -> Member:
    """The member with the bytes that may be looked at: those of images, labels and JSON of a sound size."""
    if _image_kind(kind):
        return member
    ending = next((k for k in (*LABELS, JSON) if kind == k or kind.endswith(f".{k}")), "")
    most = {JSON: MAX_JSON_BYTES, "": 0}.get(ending, MAX_LABEL_BYTES)
    if len(member.data) <= most:
        return member
    return Member(member.name, member.offset, b"" if ending == JSON else member.data[:most])


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()
