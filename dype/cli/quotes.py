"""Tell a list of prompts from the words of a prompt without quotes."""

import re

from dype.errors import UserError

# first and last letter of a text in quotes
QUOTES = [
    "''",
    '""',
    "``",
    "\u2018\u2019",
    "\u201c\u201d",
    "\u201d\u201d",
    "\u201e\u201c",
    "\u00ab\u00bb",
]
# scripts that put no spaces between words: Thai to Burmese, Khmer, Chinese, Japanese
UNSPACED = "[\u0e00-\u109f\u1780-\u17ff\u2e80-\uabff\uf900-\ufaff\U00020000-\U0003ffff]"
MAX_WORDS = 3  # prompts of a single word after one --prompt


def check_quotes(texts: list[str]) -> None:
    """Refuse the values of one --prompt if they are the words of a prompt without quotes.

    Up to three single words may be a list of prompts, so they only get a note. Raises UserError.
    """
    cure = 'put double quotes around each prompt, as --prompt "a red fox" "a blue bird"'
    for mark in ("\\", "^"):
        if mark in texts:
            raise UserError(
                f"--prompt has the value {mark}, with which lines end in another shell, expected "
                "the whole command on one line"
            )
    items = [text for text in texts if not re.search(r"\s", text)]
    for first, last in QUOTES:
        opening = [x for x in items if x.startswith(first) and not x[1:].endswith(last)]
        closing = [x for x in items if x.endswith(last) and not x[:-1].startswith(first)]
        if opening and closing:
            raise UserError(
                f"--prompt has the values {opening[0]} and {closing[-1]}, with quotes that the "
                f"shell did not read, expected whole prompts; {cure}"
            )
    for text in items:
        if len(text) > 1 and text[0] + text[-1] in QUOTES:
            print(f"--prompt is {text} with these quotes, which the shell did not read")
    words = list(dict.fromkeys(x for x in items if not re.search(UNSPACED, x)))
    if len(words) > MAX_WORDS and 2 * len(words) > len(texts):
        raise UserError(
            f"--prompt has {len(texts)} values, of which {len(words)} are single words, expected "
            f"whole prompts; {cure}; for prompts of a single word repeat --prompt"
        )
    if len(words) > 1 and {*words} == {*texts}:
        print(f"--prompt has {len(words)} prompts, each of a single word; for others {cure}")
