"""A prompt: one text for all conditions of a model that take the same text, or the name of a class."""

from __future__ import annotations

import unicodedata

from scoreray.data.errors import UserError, key_in_errors, nearest
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import class_name_of

MOST_CHARACTERS = 32_000  # of a prompt, as OpenAI's images endpoint has it
WHITESPACE = "\n\r\t"


def prompt_conditions(info: ModelInfo) -> tuple[str, ...]:
    """Names of the conditions that a prompt is the text of: all that take a text, where all are made from one field of
    the data (a caption, read by two encoders); else none."""
    sources = text_sources(info)
    return tuple(sources) if len(set(sources.values())) == 1 else ()


def text_sources(info: ModelInfo) -> dict[str, str]:
    """Of each condition that takes a text, the field of the data that the text was in."""
    sections = info.config.data.conditions or {}
    found = {}
    for name, spec in info.conditions.items():
        if spec.takes_text:
            named = sections[name].field if name in sections else None
            found[name] = spec.encoding.of if spec.encoding is not None else named or name
    return found


def prompted(prompt: str, info: ModelInfo, option: str = "prompt") -> dict[str, str]:
    """The conditions that a prompt means, by name: its text, or of a model without texts the class that it names. None
    of a model without conditions, whose prompt must be empty. Raises UserError in one line that begins with `option`.
    """
    with key_in_errors(option):
        check_text(prompt)
        texts, label = prompt_conditions(info), class_name_of(info.conditions)
        if not texts and text_sources(info):
            several = ", ".join(text_sources(info))
            raise UserError(f"this model takes texts of its own for {several}; give them as conditions")
        if not texts and label is None:
            if prompt.strip():
                raise UserError(f"this model takes no text ({info.takes}); leave it empty")
            return {}
        if not prompt.strip():
            example = "write what to draw" if texts else f"name a class; {nearest('', info.classes)}"
            raise UserError(f"is empty; {example}")
        if label is not None and not texts:
            info.class_number(prompt.strip())  # raises where there is none of that name
            return {label: prompt.strip()}
        found = dict.fromkeys(texts, prompt)
        condition_of(found, info.conditions)  # raises where it is too long
        return found


def check_text(prompt: str) -> None:
    """Raises UserError for a text that no person typed: of more characters than a prompt has, or with control
    characters or halves of surrogate pairs."""
    if len(prompt) > MOST_CHARACTERS:
        raise UserError(f"a text of {len(prompt):,} characters, at most {MOST_CHARACTERS:,}; shorten it")
    for position, one in enumerate(prompt):
        if unicodedata.category(one) in ("Cc", "Cs") and one not in WHITESPACE:
            raise UserError(f"control character U+{ord(one):04X} at character {position + 1}; remove it")
