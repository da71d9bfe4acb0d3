"""Tell a list of prompts from the words of a prompt without quotes."""

import re

from dype.errors import UserError

# every kind of single and double quotes, of the keyboard and of other languages
MARK = "['\"`\u00b4\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300c-\u300f\uff02\uff07]"
END = rf"{MARK}[,.;:!?]*"
OPENING = re.compile(rf"{MARK}(?!.*{END}$).*")  # the first word of a text in quotes
CLOSING = re.compile(rf"(?!{MARK}.).*{END}")  # the last
# scripts that put no spaces between words: Thai to Burmese, Khmer, Chinese, Japanese
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u3007\u3010-\uabff\uf900-\ufaff\U00020000-\U0003ffff]"
)
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
    opening, closing = (list(filter(form.fullmatch, items)) for form in (OPENING, CLOSING))
    if opening and closing:
        raise UserError(
            f"--prompt has the values {opening[0]} and {closing[-1]}, with quotes that the shell "
            f"did not read, expected whole prompts; {cure}"
        )
    for text in items:
        if re.fullmatch(f"{MARK}.*{MARK}", text):
            print(f"--prompt is {text} with these quotes, which the shell did not read")
    words = {text for text in items if not UNSPACED.search(text)}
    if len(words) > MAX_WORDS and 2 * len(words) > len(texts):
        raise UserError(
            f"--prompt has {len(texts)} values, of which {len(words)} are single words, expected "
            f"whole prompts; {cure}; for prompts of a single word repeat --prompt"
        )
    if words and len({*texts}) > 1:
        print(f"--prompt has {len(texts)} prompts, {len(words)} of a single word; if not, {cure}")
