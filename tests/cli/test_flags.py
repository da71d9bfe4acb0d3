"""Words of the command line become flags and values; prompts are kept to the letter."""

import pytest

from dype.cli import flags
from dype.cli.settings import load_profile
from dype.errors import UserError


def parse(*words) -> dict:
    return vars(flags.parse([*words]))


KEPT = [  # prompts
    "--no-humans, a red-sun",
    "--no-dype, a red-sun",
    "--low-quality=bad, blurry",
    "-1 degrees",
    "-1",
    "a\n--no-dype = x-y",
    "\u2013 a red-sun \u2014",
    "'hello'",
    "\u201chello\u201d",
    "a fox \\",
]
FLAG_LIKE = ["--seed", "--no-dype", "--no-humans", "-x", "-", "--size=tall, x", "\u2013seed"]


@pytest.mark.parametrize("flag", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("text", KEPT + FLAG_LIKE)
def test_texts_are_kept_to_the_letter(flag, text):
    """Hyphens become underscores in names of flags alone; FLAG=VALUE takes any value."""
    expected = [text] if flag == "prompt" else text
    spelling = flag.replace("_", "-")
    assert parse(f"--{spelling}={text}", "--no-dype") == {flag: expected, "dype": [False]}
    if text in KEPT:
        assert parse(f"--{spelling}", text, "--no-dype") == {flag: expected, "dype": [False]}


def test_a_text_of_a_file_is_kept_to_the_letter(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[default]\nprompt = ['--no-dype', '-x', 'a', 'b', 'c']\n")
    assert load_profile(str(path), None)["prompt"] == ["--no-dype", "-x", "a", "b", "c"]


REFUSED = {  # words, separated by | -> words of the sentence
    "--prompt=--": "expected another value",
    "--prompt|--seed": "needs --prompt=VALUE",
    "--prompt|-x": "needs --prompt=VALUE",
    "--negative_prompt|--no-humans": "needs --negative_prompt=VALUE",
    "--prompt|a red fox|--no-humans": "FLAG=VALUE for a value that begins with a hyphen",
    "--prompt|a red fox|\u2013seed|3": "expected --seed",
    "\u2014prompt|a red fox": "expected --prompt",
    "-prompt|a red fox": "expected --prompt",
    "--seed\u00a03": r"--seed\xa03",
    "--init_image|my|photo.png": "a value of several words needs quotes",
    "--prompt|a|red|sun|over|blue|mountains": "6 values, of which 6 are single words",
    "--prompt|1girl,|solo,|red_hair,|blue_eyes": "4 values",
    "--prompt|a|sign|that|says|open now|in|neon": "7 values, of which 6 are single words",
    "--prompt|'a|red|sun'": "the values 'a and sun'",
    "--prompt|a cat|'a|dog'": "the values 'a and dog'",
    "--prompt|'|cat|'": "the values ' and '",
    "--prompt|\u201ca|red|sun\u201d": "the values \u201ca and sun\u201d",
    "--prompt|\u201e\u732b|\u72ac\u201c": "with quotes that the shell did not read",
    "--prompt|\u201aa|ring\u2018,": "the values \u201aa and ring\u2018,",
    "--prompt|\u00bba|ring\u00ab.": "the values \u00bba and ring\u00ab.",
    "--prompt|\u2039a|ring\u203a": "the values \u2039a and ring\u203a",
    "--prompt|``a|ring''": "the values ``a and ring''",
    "--prompt|\u300c\u732b|\u72ac\u300d": "the values \u300c\u732b and \u72ac\u300d",
    "--no-dype=on": "--no_dype is 'on', expected no value",
    "--help=x": "--help is 'x', expected no value",
    "--prompt|a red fox|\\": "expected the whole command on one line",
    "--prompt|a red fox|^": "expected the whole command on one line",
}


@pytest.mark.parametrize("words", REFUSED)
def test_words_of_an_unquoted_value_are_refused(words):
    with pytest.raises(UserError) as error:
        flags.parse(words.split("|"))
    assert REFUSED[words] in str(error.value)


LISTS = {  # prompts, separated by | -> whether a note says that each is a single word, or quoted
    "cat": False,
    "'cat'": True,
    "\u201ccat\u201d": True,
    "a \u201ccat\u201d": False,
    "cat|dog": True,
    "a|b|c": True,
    "a cat|a dog": False,
    "a cat|dog|bird|fox|a wolf|a bear": True,
    "a cat|in|snow": True,
    "cat|cat": False,
    "\u2018cat\u201b": True,
    "\u4e00\u53ea\u7ea2|\u65e5\u672c|\u57ce|\u732b|\u72ac": False,
    "'tis a fox|the dogs' bed": False,
}


@pytest.mark.parametrize("prompts", LISTS)
def test_lists_of_prompts_are_kept(prompts, capsys):
    texts = prompts.split("|")
    assert parse("--prompt", *texts)["prompt"] == texts
    assert capsys.readouterr().out.startswith("--prompt ") == LISTS[prompts]


@pytest.mark.parametrize("flag", ["output", "output_dir", "lora", "model", "init_image", "from"])
def test_the_home_folder_of_a_path(flag, monkeypatch):
    """Shells do not replace it in FLAG=VALUE."""
    monkeypatch.setenv("HOME", "/home/me")
    [value] = parse(f"--{flag}=~/a").values()
    assert value in ("/home/me/a", ["/home/me/a"])


def test_a_repeated_flag_takes_any_number_of_single_words():
    words = ["a", "red", "sun", "over", "blue", "mountains"]
    assert parse(*(f"--prompt={word}" for word in words))["prompt"] == words
