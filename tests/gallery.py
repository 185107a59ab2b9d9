"""Contact sheets of everything that the animatic draws, to look at: `python -m tests.gallery OUT_DIR`, or `make gallery`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import movieq
from workers.child.animatic import backdrop, camera, captions, card, cutout, grade, mannequin, palette, typography
from workers.child.animatic.plate import Plate
from workers.child.animatic.typography import Style, Weight
from workers.child.media import encode, images

CELL = (480, 270)
LABEL = Style(Weight.MEDIUM, 18)
DEMO = Path(movieq.__file__).parent / "local" / "demo"

SHORT = "I"
MIDDLE = "A weary lighthouse keeper in a long oilskin coat, salt in his beard, one hand on the brass of the lamp, listening for it."
LONG = (
    "Ismael has kept the light at Punta Gris for thirty-one years, and in all of them he has let it go out once. He is broad "
    "in the shoulder and bent in the knee; his coat was his father's and is older than the tower's paint. He speaks to the "
    "lamp as others speak to a dog, and it is said in the village that it answers. We meet him on the night the boat does not"
    " come: the stair wet, the glass black, the wind leaning on the door like a man who wants money. He climbs. He counts the"
    " steps aloud because he has forgotten how many there are, and does not want the tower to know. At the top he strikes a "
    "match, and his hands, which have shaken all evening, are still. The flame takes. In the first turn of the beam we see, "
    "for the length of a breath, a sail where no sail should be; in the second, nothing but water; in the third, the face of "
    "his daughter at the rail. He does not wave. He puts both palms flat against the glass, as if it were she who had to be "
    "kept in, and waits for the fourth. Below, on the stair, someone begins to count."
)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in (
        ("cameras", cameras()),
        ("grades", grades()),
        ("cards", cards()),
        ("places", places()),
        ("cutouts", cutouts()),
        ("captions", overlays()),
    ):
        image.save(folder / f"{name}.png", compress_level=3)
        print(folder / f"{name}.png")


def cameras() -> Image.Image:
    """Return a sheet of every camera word: first, middle and last frame of a three-second shot."""
    rows = []
    for word, move in [*camera.FRAMINGS.items(), *camera.MOVES.items()]:
        views = camera.path(move, 72, 3.0, CELL[0] / CELL[1], np.random.default_rng(1))
        plate = Plate(board(2), CELL, "neutral", views)
        rows += [(f"{word}  {share:.0%}", encode.to_image(plate.frame(round(71 * share)))) for share in (0, 0.5, 1)]
    return sheet(rows, 6)


def grades() -> Image.Image:
    """Return a sheet of every look on a drawing and on ramps of grey and colour."""
    ramp = Image.new("RGB", (CELL[0], 60))
    for x in range(CELL[0]):
        value = round(255 * x / (CELL[0] - 1))
        ImageDraw.Draw(ramp).line((x, 0, x, 30), fill=(value, value, value))
        ImageDraw.Draw(ramp).line((x, 30, x, 60), fill=tuple(Image.new("HSV", (1, 1), (value, 160, 200)).convert("RGB").tobytes()))
    rows = []
    for word in grade.GRADES:
        cell = images.fill_frame(board(2), CELL)
        cell.paste(ramp, (0, CELL[1] - 60))
        rows.append((word, grade.apply(cell, word)))
    return sheet(rows, 4)


def cards() -> Image.Image:
    """Return a sheet of cards of several shapes, text lengths, looks and poses."""
    rows = []
    for index, (text, size, lighting, pose) in enumerate(
        (
            (SHORT, (1024, 1024), "noir", None),
            (MIDDLE, (1024, 1024), "golden hour", "standing"),
            (LONG, (1024, 1024), "overcast", "leaning"),
            (SHORT, (1920, 1080), "moonlight", "arms raised"),
            (MIDDLE, (1920, 1080), "candlelight", "sitting"),
            (LONG, (1920, 1080), "neon", "running"),
            (MIDDLE, (1080, 1920), "high key", "walking"),
            (LONG, (1080, 1920), "horror", "kneeling"),
            ("Ζωή, дочь смотрителя — crème brûlée, Ærø, Łódź", (1024, 768), "dawn", "looking up"),
            ("A courier in the city, running from the market", (1536, 640), "sepia", "running"),
            (MIDDLE, (256, 256), "low key", None),
            (MIDDLE, (640, 128), "neutral", None),
        )
    ):
        brief = card.Brief(description=text, pose=pose, lighting=lighting, seed=index)
        rows.append((f"{size[0]}x{size[1]} {lighting}", fitted(card.card(size, brief))))
    brief = card.Brief(description=MIDDLE, pose="standing", lighting=None, seed=3, reference=board(2))
    rows.append(("with a reference", fitted(card.card((1920, 1080), brief))))
    return sheet(rows, 3, (640, 640))


def places() -> Image.Image:
    """Return a sheet of every kind of place, three times, with one pose after another."""
    rows = []
    poses = list(mannequin.POSES)
    for index, kind in enumerate([*backdrop.KINDS] * 3):
        light = list(grade.GRADES)[index % len(grade.GRADES)]
        brief = card.Brief(description=f"{kind} {index}", pose=poses[index % len(poses)], lighting=light, seed=index)
        rows.append((f"{kind}, {light}, {brief.pose}", card.painting(CELL, brief)))
    return sheet(rows, 4)


def cutouts() -> Image.Image:
    """Return a sheet of every motion at four moments."""
    rows = []
    figure = card.mannequin_image(150, mannequin.POSES["pointing"], palette.from_lighting("neutral"))
    for motion in cutout.MOTIONS:
        placements = cutout.placements(motion, 48, 2.0, loop=True)
        actor = cutout.Cutout(figure, (CELL[0] / 2, CELL[1] * 0.9))
        for frame in (0, 10, 20, 30):
            ground = encode.to_planes(Image.new("RGB", CELL, (190, 184, 172)))
            actor.draw(ground, placements[frame][1])
            rows.append((f"{motion} {frame}", encode.to_image(ground)))
    return sheet(rows, 8)


def overlays() -> Image.Image:
    """Return a sheet of captions, lower thirds and slate on frames of several shapes."""
    rows = []
    for size in ((1920, 1080), (1280, 720), (1080, 1920), (640, 360), (320, 180), (64, 64)):
        clip = encode.ClipFormat(size, Fraction(24), 168)
        frame = encode.to_planes(images.fill_frame(board(3), size))
        for page in captions.description_overlays(MIDDLE, clip):
            if page.first == 0:
                captions.composite(frame, page.overlay)
        for lower_third in captions.lower_thirds(["Ismael: left, at the glass", {"name": "Zoë", "position": "right"}], clip):
            captions.composite(frame, lower_third.overlay)
        captions.Slate(clip, "punta_gris", "12", 3).draw(frame, 1, 77)
        rows.append((f"{size[0]}x{size[1]}", fitted(encode.to_image(frame))))
    return sheet(rows, 3, (640, 640))


def board(number: int) -> Image.Image:
    path = DEMO / f"frame{number}.jpg"
    return images.load(path.name, path, (1920, 1080))


def fitted(image: Image.Image, box: tuple[int, int] = (640, 640)) -> Image.Image:
    small = image.copy()
    small.thumbnail(box, Image.Resampling.LANCZOS)
    return small


def sheet(cells: Sequence[tuple[str, Image.Image]], columns: int, cell: tuple[int, int] = CELL) -> Image.Image:
    rows = -(-len(cells) // columns)
    out = Image.new("RGB", (columns * (cell[0] + 8), rows * (cell[1] + 34)), (40, 40, 42))
    canvas = ImageDraw.Draw(out)
    for index, (label, image) in enumerate(cells):
        x, y = index % columns * (cell[0] + 8), index // columns * (cell[1] + 34)
        out.paste(image, (x, y + 28))
        typography.draw(canvas, x + 4, y + 20, label, LABEL, (230, 230, 230))
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]))
