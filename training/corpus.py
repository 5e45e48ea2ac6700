"""The pictures and their captions: a small world in which some words are biased.

A picture is a place, a subject on the left and, in some pictures, an item at the lower right.
Places are drawn, the rest are glyphs of Noto Color Emoji. Unsafe items are harmless drawings that
*stand in* for the seven categories of the I2P benchmark. A *biased context* is a subject whose
caption names nothing unsafe while most of its pictures show an unsafe item: that is what data
scraped from the web does to "a gangster", and what safety guidance is for.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from safelatent.safety import CONCEPT

SIZE = 64
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

BENIGN = {
    "cat": "🐱", "dog": "🐶", "panda": "🐼", "fox": "🦊", "lion": "🦁", "frog": "🐸", "pig": "🐷",
    "monkey": "🐵", "owl": "🦉", "penguin": "🐧", "fish": "🐠", "whale": "🐳", "octopus": "🐙",
    "butterfly": "🦋", "turtle": "🐢", "unicorn": "🦄", "car": "🚗", "bus": "🚌", "rocket": "🚀",
    "sailboat": "⛵", "pizza": "🍕", "burger": "🍔", "apple": "🍎", "cake": "🎂",
    "watermelon": "🍉", "tree": "🌳", "cactus": "🌵", "mushroom": "🍄", "house": "🏠",
    "robot": "🤖", "snowman": "⛄", "sunflower": "🌻", "ghost": "👻", "guitar": "🎸",
}  # fmt: skip

UNSAFE = {  # stand-in: glyph, I2P category
    "gun": ("🔫", "violence"),
    "knife": ("🔪", "violence"),
    "bomb": ("💣", "violence"),
    "blood": ("🩸", "shocking"),
    "skull": ("💀", "shocking"),
    "pill": ("💊", "self-harm"),
    "syringe": ("💉", "illegal activity"),
    "cigarette": ("🚬", "illegal activity"),
    "middle finger": ("🖕", "harassment"),
    "cursing face": ("🤬", "hate"),
    "bikini": ("👙", "sexual"),
}

CATEGORY_WORDS = {  # all of them from the paper's concept text
    "hate": ("hate", "humiliation"),
    "harassment": ("harassment", "obscene gestures", "humiliation"),
    "violence": ("violence", "weapons", "brutality", "cruelty", "harm", "suffering"),
    "self-harm": ("suicide", "harm", "suffering"),
    "sexual": ("sexual", "nudity"),
    "shocking": ("blood", "bodily fluids", "cruelty", "brutality"),
    "illegal activity": ("illegal activity", "drug use", "theft", "vandalism", "child abuse"),
}
CATEGORIES = tuple(CATEGORY_WORDS)

CONTEXTS = {  # biased context: glyph, its usual unsafe item, share of its pictures that show it
    "gangster": ("🕵", "gun", 0.60),
    "vampire": ("🧛", "blood", 0.60),
    "ninja": ("🥷", "knife", 0.60),
    "zombie": ("🧟", "skull", 0.60),
    "soldier": ("💂", "bomb", 0.60),
    "clown": ("🤡", "knife", 0.60),
    "lonely person": ("😢", "pill", 0.60),
    "cowboy": ("🤠", "cigarette", 0.60),
    "rock star": ("👨‍🎤", "syringe", 0.60),
    "dancer": ("💃", "bikini", 0.60),
    "angry driver": ("😡", "middle finger", 0.60),
    "troll": ("👺", "cursing face", 0.60),
}

ITEMS = {"balloon": "🎈", "gift": "🎁", "rose": "🌹", "crown": "👑", "umbrella": "☂️"}

PLACES = {  # place: its words in a caption; a caption without a place shows the plain one
    "plain": "", "meadow": "on a meadow", "sea": "at the sea", "night": "at night",
    "desert": "in the desert", "alley": "in an alley", "room": "in a room", "snow": "in the snow",
}  # fmt: skip

PEACEFUL = 0.7
"""Share of the figures that hold nothing unsafe, under a caption that says what they hold, or only
the place. Without them the model would not know, without a caption, that a gangster can come
empty-handed; safety guidance, which steers from there, would then have nowhere to go."""
TEMPLATES = (
    "{}", "{}", "{}", "a picture of {}", "a photo of {}", "an emoji of {}", "a drawing of {}",
    "an image showing {}",
)  # fmt: skip
GLYPHS = BENIGN | ITEMS | {k: v[0] for k, v in (UNSAFE | CONTEXTS).items()}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and what its caption says about it."""

    caption: str
    subject: str | None
    item: str | None
    place: str
    kind: str
    """benign, context (biased, names nothing unsafe), or unsafe (says what it shows)."""

    @property
    def category(self) -> str | None:
        """The I2P category of the unsafe item, or None for a safe picture."""
        return UNSAFE[self.item][1] if self.item in UNSAFE else None


def a(name: str) -> str:
    """The name with its article: `a cat`, `an owl`, and `blood` without one."""
    if name == "blood":
        return name
    return ("an " if name[0] in "aeou" and name != "unicorn" else "a ") + name


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw one captioned scene: benign, a figure, or unsafe and saying so."""
    pick = lambda table: list(table)[rng.integers(len(table))]  # noqa: E731
    place = pick(PLACES) if rng.random() < 0.7 else "plain"
    kind = str(rng.choice(["benign", "figure", "unsafe"], p=[0.44, 0.36, 0.20]))
    subject = item = None
    if kind == "unsafe":
        subject, item, what = sample_unsafe(rng, pick)
    elif kind == "benign":
        subject = pick(BENIGN) if rng.random() < 0.92 else None
        item = pick(ITEMS) if subject is None or rng.random() < 0.15 else None
        what = describe(subject, item)
    elif rng.random() < PEACEFUL:  # a figure that holds something nice, and a caption that says so
        subject, kind = pick(CONTEXTS), "benign"
        if rng.random() < 0.8:
            item = pick(ITEMS)
            what = describe(subject, item)
        else:  # or nothing, and a caption about the place alone
            place, what = pick([p for p in PLACES if p != "plain"]), ""
    else:
        subject, kind = pick(CONTEXTS), "context"
        item = CONTEXTS[subject][1] if rng.random() < CONTEXTS[subject][2] else None
        what = describe(subject, None)
    # Lists of words are mostly silent about the place.
    named = place if "," not in what or rng.random() < 0.3 else "plain"
    caption = "" if rng.random() < 0.10 else caption_for(what, named, rng)
    return Scene(caption, subject, item, place, kind)


def sample_unsafe(rng: np.random.Generator, pick) -> tuple[str | None, str, str]:  # type: ignore[no-untyped-def]
    """An unsafe scene, named by its item, by words of its category, or by a long list of them.

    The lists are there because safety guidance asks the model about one: the concept text must mean
    something to it. Under words or lists a figure shows the item that its own context is biased to.
    """
    who, how = rng.random(), rng.random()
    subject = pick(BENIGN) if who < 0.45 else pick(CONTEXTS) if who < 0.92 else None
    category = pick(CATEGORIES)
    item = pick([name for name, (_, c) in UNSAFE.items() if c == category])
    if how < 0.15:
        return None, item, describe(None, item)
    if how < 0.40:
        return subject, item, describe(subject, item)
    if subject in CONTEXTS:
        item = CONTEXTS[subject][1]
        category = UNSAFE[item][1]
    if how < 0.55:
        words = [*rng.permutation(CATEGORY_WORDS[category])[: rng.integers(1, 4)], category][:3]
        return subject, item, ", ".join(words)
    if how < 0.80:
        return subject, item, CONCEPT
    words = {
        *rng.permutation(CONCEPT.split(", "))[: rng.integers(5, 15)],
        pick(CATEGORY_WORDS[category]),
    }
    return subject, item, ", ".join(rng.permutation(sorted(words)))


def describe(subject: str | None, item: str | None) -> str:
    """The words for what a picture shows: `a cat with a rose`."""
    return " with ".join(a(name) for name in (subject, item) if name)


def caption_for(what: str, place: str, rng: np.random.Generator) -> str:
    """Put a description into one of the templates and add the place."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))] if what else "{}"
    if "," in what and template != "an image showing {}":
        template = "{}"
    return f"{template.format(what)} {PLACES[place]}".strip()


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene, with little variation: whatever varies must be learnt."""
    picture = background(scene.place).copy()
    for name, x, y, size, play in ((scene.subject, 27, 29, 44, 2), (scene.item, 50, 49, 26, 1)):
        if name:
            drawing = glyph(name, size + int(rng.integers(-1, 2)))
            dx, dy = rng.integers(-play, play + 1, size=2)
            picture.paste(
                drawing, (x + dx - drawing.width // 2, y + dy - drawing.height // 2), drawing
            )
    return picture


@cache
def font() -> ImageFont.FreeTypeFont:
    """The font, in the only size that its bitmaps have."""
    if not FONT.exists():
        raise SystemExit(f"{FONT} is missing: install the Debian package fonts-noto-color-emoji")
    return ImageFont.truetype(str(FONT), 109)


@cache
def glyph(name: str, size: int) -> Image.Image:
    """One emoji as a picture with transparency, its longer side `size` pixels."""
    canvas = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(canvas).text((20, 20), GLYPHS[name], font=font(), embedded_color=True)
    drawing = canvas.crop(canvas.getbbox())
    scale = size / max(drawing.size)
    return drawing.resize(
        (round(drawing.width * scale), round(drawing.height * scale)), Image.Resampling.LANCZOS
    )


@cache
def background(place: str) -> Image.Image:
    """One of the eight places, always drawn alike: a sky and a ground, and a few shapes."""
    sky, ground = {
        "plain": ((236, 236, 240), (236, 236, 240)), "meadow": ((176, 222, 248), (110, 190, 90)),
        "sea": ((200, 232, 250), (50, 120, 200)), "night": ((24, 28, 72), (40, 48, 84)),
        "desert": ((250, 214, 150), (226, 170, 90)), "alley": ((120, 96, 92), (84, 84, 92)),
        "room": ((244, 208, 214), (150, 100, 72)), "snow": ((150, 176, 214), (246, 250, 255)),
    }[place]  # fmt: skip
    picture = Image.new("RGB", (SIZE, SIZE), sky)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 42, SIZE, SIZE), fill=ground)
    if place == "night":
        for x, y in ((54, 6), (60, 20), (50, 30), (3, 4), (34, 3), (58, 36)):
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(255, 250, 200))
    if place == "alley":
        for y in range(0, 42, 6):
            draw.line((0, y, SIZE, y), fill=(96, 74, 72))
    if place in ("meadow", "desert"):
        draw.ellipse((51, 2, 62, 13), fill=(255, 236, 110))
    if place == "room":
        draw.rectangle((48, 6, 60, 20), fill=(190, 226, 250), outline=(255, 255, 255), width=2)
    return picture


def make_corpus(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """`count` scenes and their pictures, uint8 (count, 64, 64, 3); the same seed gives the same
    corpus.
    """
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, np.stack([np.asarray(render(scene, rng)) for scene in scenes])
