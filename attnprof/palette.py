"""One colour per category, and the order in which categories are stacked, for every picture.

Neighbours in `STACK` were chosen to stay apart for people with protanopia, deuteranopia and
tritanopia, and every colour to be visible on white and on near-black. Colour is never the only
carrier of meaning: wherever one is used, the category's name stands next to it.
"""

from attnprof.vocabulary import Category

COLOURS: dict[Category, str] = {
    Category.PARAMETERS: "#1f77e6",
    Category.BUFFERS: "#5cc4c8",
    Category.GRADIENTS: "#6d28c9",
    Category.OPTIMIZER_STATE: "#0b7a4b",
    Category.PREEXISTING: "#b5a8ae",
    Category.INPUTS: "#b9db9f",
    Category.ACTIVATIONS: "#8f9be3",
    Category.TEMPORARIES: "#5fddf7",
    Category.ATTENTION_IO: "#a8649f",
    Category.KV_CACHE: "#86207a",
    Category.RECURRENT_STATE: "#b9b5ff",
    Category.ATTENTION_MASK: "#fac701",
    Category.ATTENTION_SCORES: "#e5860b",
    Category.SOFTMAX: "#d6131b",
    Category.WORKSPACE: "#5f6670",
    Category.UNATTRIBUTED: "#8c8f7b",
}
"""Hot colours are what grows with n²; the rest is cool or grey."""

STACK: tuple[Category, ...] = tuple(COLOURS)
"""Bottom to top: what stays for the whole run first, what comes and goes last."""


SERIES = ("#5f7fae", "#b8823a", "#5f8f72", "#9c7096", "#85888f", "#4f9a9e")
"""What is no category (runs, levels, forms) is muted, so that it is not mistaken for one."""

MORE, LESS = "#b8693a", "#5f7fae"
"""A difference upwards and downwards; told apart by everybody."""


def colour_of(category: str) -> str:
    """Return the colour of a category as ``#rrggbb``; of an unknown one, unattributed's."""
    try:
        return COLOURS[Category(category)]
    except ValueError:  # a run of a newer attnprof may know more words
        return COLOURS[Category.UNATTRIBUTED]


def stack_order(category: str) -> int:
    """Return where a category stands in `STACK`, for sorting; unknown ones come last."""
    try:
        return STACK.index(Category(category))
    except ValueError:
        return len(STACK)
