"""The README does what it says: its Python runs, its commands exist with the options that it shows.

Every ```python block runs, in order, in one namespace and an empty folder. A block that can't run in a test (it needs
a GPU, say) opens with ```python no-run and has to compile at least. In ```bash blocks, `prequant` commands are parsed
by the real command line, `make` targets are looked up in the Makefile and `python` scripts in the checkout.
"""

import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from prequant.cli import app

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<info>\S[^\n]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.DOTALL | re.MULTILINE
)
SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after its fence, its text, and the line of the file that its text begins on."""

    language: str
    flags: tuple[str, ...]
    code: str
    line: int


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of a Markdown text in one of the languages."""
    found = []
    for match in FENCE.finditer(text):
        language, *flags = match["info"].split()
        if language in languages:
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(Block(language, tuple(flags), textwrap.dedent(match["code"]), line))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, each as its words, without comments, prompts, assignments and redirections."""
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set("();<>|&"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(token)


def parse_only(command: Any) -> Any:
    """The same command line, made to check its words and do nothing."""
    command.callback = lambda **_: None
    for below in getattr(command, "commands", {}).values():
        parse_only(below)
    return command


def complaint(command: Any, words: list[str]) -> str | None:
    """What the command line has against the words, if anything. That a file isn't there is no fault of theirs."""
    try:
        command.main(words, prog_name="prequant", standalone_mode=False)
    except Exception as error:
        # Typer carries its own copy of click's exceptions, under no public name; every one of them has this method.
        if not hasattr(error, "format_message"):
            raise
        message = str(error.format_message())
        return None if message.endswith("does not exist.") else message
    return None


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(readme, "python", "py")
    assert any("no-run" not in block.flags for block in found), "README.md shows no Python that runs"
    namespace = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", namespace)  # where dataclasses and pickle look a class's module up
    monkeypatch.chdir(tmp_path)
    for block in found:
        # Blank lines in front, so that a traceback shows the README's own line.
        code = compile("\n" * (block.line - 1) + block.code, str(ROOT / "README.md"), "exec")
        if "no-run" not in block.flags:
            exec(code, vars(namespace))


def test_shown_commands_exist(readme: str) -> None:
    shown = [(block.line, words) for block in blocks(readme, *SHELLS) for words in commands(block)]
    assert any(words[0] == "prequant" for _, words in shown), "README.md shows no prequant command"
    command = parse_only(typer.main.get_command(app))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line, words in shown:
        where = f"README.md, block at line {line}: {shlex.join(words)}"
        match words:
            case ["prequant", *rest]:
                refused = complaint(command, rest)
                assert refused is None, f"{where}: {refused}"
            case ["make", *rest]:
                for target in (word for word in rest if "=" not in word and not word.startswith("-")):
                    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{where}: no such target"
            case ["python" | "python3", script, *_] if script.endswith(".py"):
                assert (ROOT / script).is_file(), f"{where}: no such file"


def test_blocks_are_found_wherever_they_stand() -> None:
    text = "# T\n```python\na = 1\n```\ntext\n* item\n  ```python no-run\n  if a:\n      b\n  ```\n```\nplain\n```\n"
    first, second = blocks(text, "python")
    assert (first.code, first.line, first.flags) == ("a = 1\n", 3, ())
    assert (second.code, second.flags) == ("if a:\n    b\n", ("no-run",))


def test_commands_are_read_as_a_shell_would() -> None:
    code = "$ make demo  # why\nA=1 prequant run \\\n  --passes 'a{bits=4},b' | tee log && prequant view x\n"
    assert list(commands(Block("bash", (), code, 1))) == [
        ["make", "demo"],
        ["prequant", "run", "--passes", "a{bits=4},b"],
        ["tee", "log"],
        ["prequant", "view", "x"],
    ]


def test_parse_only_still_refuses_what_the_command_line_would() -> None:
    program = typer.Typer()

    @program.command()
    def shrink(model: Path, bits: int = 4) -> None:
        raise AssertionError("parsed only, never run")

    @program.command()
    def view(model: Annotated[Path, typer.Argument(exists=True)]) -> None:
        raise AssertionError("parsed only, never run")

    command = parse_only(typer.main.get_command(program))
    for right in (["shrink", "folder", "--bits", "2"], ["view", "no/such/folder"], ["view", "--help"]):
        assert complaint(command, right) is None
    for wrong in (["shrimp"], ["shrink"], ["shrink", "folder", "--bit", "2"], ["shrink", "folder", "--bits", "two"]):
        assert complaint(command, wrong), wrong
