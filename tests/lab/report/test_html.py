import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_results import results

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.report.html import write_html
from modelopt_tdq.lab.report.results import load_results

pytest.importorskip("jinja2")


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = write_html(results(tmp_path), tmp_path, tmp_path / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert re.findall(r"<(?:script|link|iframe|object)", page) == []
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in page


def test_text_is_escaped(tmp_path: Path) -> None:
    page = write_html(results(tmp_path), tmp_path, tmp_path / "report.html").read_text()
    assert "A note with &lt;tags&gt;." in page
    assert "A &amp; B &lt;cpu&gt;" in page


def test_gains_are_those_of_the_table(tmp_path: Path) -> None:
    content = results(tmp_path)
    content["rows"][3] |= {"sqnr_mean_db": 39.5, "psnr_db": 33.0}
    page = write_html(content, tmp_path, tmp_path / "report.html").read_text()
    for gain in ("+4.0 dB", "+1.5 dB", "+3.0 dB"):
        assert f"<td>{gain}</td>" in page


@pytest.mark.parametrize("name", ["../outside.png", "gone.png", "secret.txt"])
def test_figures_come_from_the_folder_of_the_results(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    content = results(folder)
    (tmp_path / "outside.png").write_bytes(b"x")
    (folder / "secret.txt").write_text("x")
    content["figures"][0]["file"] = name
    with pytest.raises(TdqError, match="figures"):
        write_html(content, folder, folder / "report.html")
    assert not (folder / "report.html").exists()


def test_results_survive_the_file(tmp_path: Path) -> None:
    content = results(tmp_path)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content, allow_nan=False))
    assert load_results(file) == content


def _without(name: str) -> Any:
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("rows"), "missing"),
        (lambda content: content | {"kind": "other"}, "not the results"),
        (lambda content: content | {"schema_version": 99}, "schema_version"),
        (lambda content: [content], "not the results"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(change(results(tmp_path))))
    with pytest.raises(TdqError, match=message):
        load_results(file)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such file"):
        load_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(TdqError, match="not JSON"):
        load_results(tmp_path / "results.json")
