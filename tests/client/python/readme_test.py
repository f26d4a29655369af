"""The examples of the READMEs run."""

import re
from pathlib import Path

import pytest
from programs import ROOT, Server

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("folder", [".", "client/python"])
def test_examples(server: Server, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a file, one after the other."""
    path: Path = ROOT / folder / "README.md"
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        assert "127.0.0.1:8470" in block
        exec(compile(block.replace("127.0.0.1:8470", server.address), str(path), "exec"), names)
    said = capsys.readouterr().out
    if folder == "client/python":
        assert "spec.bits | expected 2 to 8, got 9 | INVALID_ARGUMENT None\n" in said
        assert "3 bits" in said
    else:
        assert "'qweight'" in said
        assert "(64, 128)" in said
