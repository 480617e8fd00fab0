"""Labels of frames: who speaks when, which phone it is, whether there is speech."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from typing import Any

from speech_flax.data.labels import LabelError
from speech_flax.data.loader import IGNORED_LABEL

#: Class of the frames that no segment covers, where every frame has exactly one label.
SILENCE = "silence"
#: More labels that hold at once do not fit into the bits of one number.
MOST_LABELS = 31


@dataclasses.dataclass(frozen=True)
class Segment:
    """``label`` holds from ``start`` to ``end`` seconds."""

    start: float
    end: float
    label: str


@dataclasses.dataclass(frozen=True)
class FrameEncoder:
    """Labels in the data to one number per frame.

    In the data they are JSON: a list of segments, ``[{"start": 0.5, "end": 2.1, "label": "A"}, ...]`` in seconds; or a
    list with one entry per frame: a name, the number of a class, or a list of zeros and ones. A frame has the labels of
    the segments that hold at its centre.

    With ``several``, any number of labels may hold at a frame, and bit ``i`` of its number stands for ``names[i]``.
    Otherwise the number is the index of its label; frames that no segment covers are ``"silence"``.

    Args:
        names: Labels; at most 31 with ``several``.
        frame_seconds: Distance of frames.
        several: Whether several labels, or none, may hold at once.
    """

    names: tuple[str, ...]
    frame_seconds: float
    several: bool

    def encode(self, text: str) -> list[int]:
        """One number per frame; the last one holds for all frames that follow, too. After the last segment no label
        holds; after the last entry of a frame nothing is known, which is the number that losses ignore.

        Raises:
            LabelError: for labels of another form, names that are not among ``names``, or overlapping segments
                without ``several``.
        """
        entries = parse(text)
        if is_segments(entries):
            return self._of_segments(entries, text)
        return [*(self._of_entry(entry, text) for entry in entries), IGNORED_LABEL]

    def _of_segments(self, segments: tuple[Segment, ...], text: str) -> list[int]:
        count = max((math.ceil(segment.end / self.frame_seconds) for segment in segments), default=0)
        frames = [0] * (count + 1)
        for segment in segments:
            first, end = (math.ceil(time / self.frame_seconds - 0.5) for time in (segment.start, segment.end))
            for frame in range(max(first, 0), end):
                frames[frame] |= self._bit(segment.label)
        return [self._number(frame, text) for frame in frames]

    def _of_entry(self, entry: Any, text: str) -> int:
        if isinstance(entry, list) and len(entry) == len(self.names):
            return self._number(sum(1 << index for index, present in enumerate(entry) if present), text)
        if isinstance(entry, int) and 0 <= entry < len(self.names):
            return self._number(1 << entry, text)
        return self._number(self._bit(entry), text)

    def _bit(self, name: Any) -> int:
        if name not in self.names:
            raise LabelError(f"there is no label {name!r} of frames but {', '.join(map(repr, self.names))}")
        return 1 << self.names.index(name)

    def _number(self, bits: int, text: str) -> int:
        if self.several:
            return bits
        if bits == 0:
            return self.names.index(SILENCE)
        if bits.bit_count() > 1:
            raise LabelError(
                f"several labels hold at one frame of {text[:60]!r}: set model.config.problem_type to "
                "multi_label_classification"
            )
        return bits.bit_length() - 1


def is_segments(entries: tuple[Any, ...]) -> bool:
    """Whether labels are segments, as opposed to entries for frames. A list without any entry is one of segments."""
    return all(isinstance(entry, Segment) for entry in entries)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> tuple[Any, ...]:
    """The segments, or the entries of frames, that a label holds.

    Raises:
        LabelError: when it is no JSON of one of these forms.
    """
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError
        if all(isinstance(entry, dict) for entry in entries):
            return tuple(Segment(float(entry["start"]), float(entry["end"]), str(entry["label"])) for entry in entries)
    except (TypeError, KeyError, ValueError):
        raise LabelError(
            f"the label {text[:60]!r} of frames is neither a JSON list of segments "
            '[{"start": 0.5, "end": 2.1, "label": "A"}, ...] nor one with an entry per frame'
        ) from None
    return tuple(entries)


def frame_label_names(labels: Iterable[str], several: bool) -> tuple[str, ...]:
    """All names in labels of frames, in alphabetical order, and "silence" if it is needed; numbers as names where
    frames are labelled by number."""
    names: set[str] = set()
    highest = -1
    for text in labels:
        entries = parse(text)
        if is_segments(entries):
            names.update(segment.label for segment in entries)
            names.update(() if several else (SILENCE,))
        else:
            names.update(entry for entry in entries if isinstance(entry, str))
            numbers = (len(entry) - 1 if isinstance(entry, list) else entry for entry in entries)
            highest = max([highest, *(number for number in numbers if isinstance(number, int))])
    return tuple(sorted(names)) or tuple(str(index) for index in range(highest + 1))
