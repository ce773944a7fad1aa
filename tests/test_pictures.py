"""The pictures of the docs: small, each made by tools/pictures.py from a screenshot of a browser test, and shown with words for who cannot see it."""
import io
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL")
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import pictures

IMAGES, LINK = ROOT/"nbs"/"images", re.compile(r"!\[([^\]]*)\]\([./]*images/(\w+)\.png\)")
SHOWN = [m for path in sorted((ROOT/"nbs").glob("**/*.ipynb")) if ".ipynb_checkpoints" not in path.parts
         for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown" for m in LINK.findall("".join(cell["source"]))]


def test_every_picture_has_a_source_a_place_and_words():
    assert {p.stem for p in IMAGES.glob("*")} == pictures.PICTURES.keys() == {name for _, name in SHOWN}
    assert all(len(alt.split()) >= 10 for alt, _ in SHOWN)
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT/"tests").glob("*_browser.py"))
    for shot in pictures.PICTURES.values(): assert f'"{shot}"' in tests or shot.startswith("tutorial_") and f'"{shot.removeprefix("tutorial_")}"' in tests


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*")), ids=lambda p: p.stem)
def test_a_picture_is_small_and_not_blank(path):
    image = Image.open(path)
    assert path.stat().st_size <= 120 * 1024 and 600 <= image.width <= pictures.WIDE and image.format == "PNG"
    low, high = image.convert("L").getextrema()
    assert high - low > 200  # ink on paper


def test_a_large_screenshot_becomes_small(tmp_path):
    "Lines of text-like noise on white, twice as wide as allowed."
    image = Image.new("RGB", (2200, 1200), "white")
    for y in range(0, 1200, 40): image.paste((y % 200, 60, 90), (40, y, 1000 + y % 700, y + 12))
    png = pictures.smaller(image)
    small = Image.open(io.BytesIO(png))
    assert len(png) <= pictures.LIMIT and small.size == (1100, 600) and small.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_a_missing_screenshot_changes_nothing(tmp_path, capsys):
    (tmp_path/"images").mkdir()
    Image.new("RGB", (700, 20)).save(tmp_path/"tutorial_training.png")
    assert pictures.main(tmp_path, tmp_path/"images") == 1 and not list((tmp_path/"images").iterdir())
    assert "tutorial_16_risk_panel.png" in capsys.readouterr().out
