"""Make the pictures of the docs in nbs/images/ out of the screenshots of the browser tests: `python tools/pictures.py FOLDER`.

`make pictures` takes the screenshots first, in a folder of its own; it needs Chromium and some minutes. No test and no check writes a
picture. Each has at most WIDE pixels across and LIMIT bytes: the colours of a screenshot are few, so a palette holds them."""
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = {  # of nbs/images -> the screenshot that it is made of
    "panel": "tutorial_training",  # a real training, steered
    "data_panel": "tutorial_12_data_panel",
    "calibration_panel": "tutorial_14_calibration_panel",
    "conformal_panel": "tutorial_15_conformal_panel",
    "risk_panel": "tutorial_16_risk_panel",
    "audit_panel": "tutorial_17_audit_panel"}
WIDE, LIMIT = 1100, 120 * 1024

def smaller(image: Image.Image) -> bytes:
    "Write a screenshot as a PNG of few colours: as many as the limit allows."
    image = image.convert("RGB")
    if image.width > WIDE: image = image.resize((WIDE, round(image.height * WIDE / image.width)), Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32):
        png = io.BytesIO()
        image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
        if png.tell() <= LIMIT: return png.getvalue()
    raise ValueError(f"a picture of {image.width} x {image.height} is over {LIMIT} bytes even with 32 colours; fix: show less in it")

def main(shots: Path, images: Path = ROOT/"nbs"/"images") -> int:
    "Write every picture, or none if a screenshot is missing."
    missing = [f"{shot}.png" for shot in PICTURES.values() if not (shots/f"{shot}.png").exists()]
    if missing:
        print("no", ", ".join(missing), "in", shots)
        return 1
    for name, shot in PICTURES.items():
        png = smaller(Image.open(shots/f"{shot}.png"))
        (images/f"{name}.png").write_bytes(png)
        print(f"{name}.png: {len(png) // 1024} KB")
    return 0


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1])))
