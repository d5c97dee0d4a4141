"""What the captions of a scene say: the object, at times its colour or the background, and words
that say nothing of the picture."""

import numpy as np

VALIDATION_CAPTION = "a photo of {a_color_object} on {a_background} background"
CAPTIONS = (
    "a photo of {an_object}",
    "a picture of {an_object}",
    "{an_object}",
    "an image of {an_object}",
    "a photo of {a_color_object}",
    "a picture of {a_color_object}",
    "{a_color_object} in a small picture",
    "this is {an_object}",
    "here you can see {an_object}",
    VALIDATION_CAPTION,
)
"""Few captions name the background or the colour: both are learned long before the object is, and
captions that differ in them alone would teach nothing else in the minutes that the demo takes."""
FILLED_SHARE = 0.5
"""Share of the captions with words before or behind that say nothing of the picture, so that
shortening captions has something to do."""
LEADS = (
    "from our holiday album,",
    "one more for the archive:",
    "found among old pictures last winter,",
    "as i promised to all of you this morning, here it is:",
    "on sale now in the shop around the corner,",
)
TAILS = (
    ", taken last summer",
    " that we found on the way home",
    ", free to use for everyone",
    ", seen again on a quiet sunday afternoon with my family",
    " from the collection of a good friend of mine",
)


def draw_captions(
    rng: np.random.Generator, name: str, color: str, background: str, number: int
) -> list[str]:
    """Different captions of an object of a class and colour on a background, in random order."""
    captions = []
    for template in rng.permutation(CAPTIONS)[:number]:
        caption = make_caption(str(template), name, color, background)
        if rng.random() < FILLED_SHARE:
            lead, tail = rng.choice(LEADS), rng.choice(TAILS)
            where = rng.integers(3)  # before, behind, or both
            caption = f"{lead} {caption}" if where != 1 else caption
            caption = f"{caption}{tail}" if where != 0 else caption
        captions.append(caption)
    return captions


def make_caption(template: str, name: str, color: str, background: str) -> str:
    return template.format(
        a_color_object=_with_article(f"{color} {name}"),
        a_background=_with_article(background),
        an_object=_with_article(name),
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
