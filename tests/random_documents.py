"""Documents that are changed at random."""

import copy

ATOMS = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**12, 2**63 - 1, -0.5, 1e-8, 1e300, 1e-308, "", "auto", "1e-8", "true",
    "cpu", "é😀", "a\nb", "x" * 300, "../x", "/etc/passwd", "\0",
)  # fmt: skip


def draw_value(draw, depth=3):
    """Any JSON value, small ones most often."""
    kind = draw.random()
    if depth == 0 or kind < 0.7:
        return draw.choice(ATOMS)
    if kind < 0.85:
        return [draw_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {str(draw.choice(ATOMS)): draw_value(draw, depth - 1) for _ in range(draw.randrange(4))}


def places(value, above=()):
    """The way to every value within `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*above, key)
        yield from places(child, (*above, key))


def changed(draw, document):
    """`document` with some values replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 4))):
        *way, last = draw.choice(list(places(document)) or [(str(draw.choice(ATOMS)),)])
        place = document
        for key in way:
            place = place[key]
        if isinstance(place, dict) and draw.random() < 0.2:
            place.pop(last, None)
        elif isinstance(place, dict) and draw.random() < 0.2:
            place[draw.choice(("x", "a\nb", str(last) + "s"))] = draw_value(draw)
        else:
            place[last] = draw_value(draw)
    return document
