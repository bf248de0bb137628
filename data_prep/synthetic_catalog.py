"""A made-up shop: categories, brands, product families and variants, with titles composed from a small word stock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BRANDS_PER_CATEGORY, FAMILIES_PER_CATEGORY, VARIANTS = 10, 6, 4
ITEMS_PER_CATEGORY = BRANDS_PER_CATEGORY * FAMILIES_PER_CATEGORY * VARIANTS
#: Successors of an item, most likely first.
SUCCESSORS = 6

_BRAND_HEADS, _BRAND_TAILS = "Nor Vel Kas Tor Bri Max Zen Ald Fer Lum", "vex tec mark lin ona ium"
_BRANDS = [head + tail for head in _BRAND_HEADS.split() for tail in _BRAND_TAILS.split()]
_LINES = "Professional Heavy Precision Compact Industrial Premium Basic Ultra Classic Marine Rapid Eco".split()
_MATERIALS = (
    "Steel Brass Nylon Copper Rubber Ceramic Carbon Titanium Aluminum Glass Vinyl Cotton Silicone Zinc Bronze "
    "Plastic Leather Foam Fiberglass Chrome Wool Felt Graphite Neoprene Iron"
).split()
_NOUNS = (
    "Hex Bolt,Wood Screw,Pipe Clamp,Ball Valve,Drill Bit,Sanding Disc,Cable Tie,Hose Nozzle,Wire Brush,Lock Washer,"
    "Storage Bin,Air Filter,Gear Motor,Shop Towel,Work Glove,Safety Mask,Tape Roll,Glue Stick,Paint Roller,Door Hinge,"
    "Shelf Bracket,Test Tube,Label Printer,Belt Sander,Spring Pin,Toggle Switch,Fuse Holder,Power Relay,Pump Seal,"
    "Oil Can,Chain Link,Tool Chest,Hand Truck,Floor Mat,Spray Bottle,Grease Gun,Rivet Set,Saw Blade,Caster Wheel,"
    "Level Gauge"
).split(",")
_SIZES = ("4mm,6mm,8mm,10mm,12mm,16mm,20mm,25mm,Small,Medium,Large,XL,10 Pack,25 Pack,50 Pack,100 Pack").split(",")


@dataclass(frozen=True)
class Catalog:
    """I items. ``successors_IS``: S items that tend to be bought next, most likely first, never the item itself."""

    titles: list[str]
    category_I: np.ndarray
    brand_I: np.ndarray  # number of the brand over all categories
    family_I: np.ndarray  # number of the family over all categories
    popularity_I: np.ndarray  # Zipf weights, sum 1
    successors_IS: np.ndarray
    brand_names: list[str]
    category_names: list[str]

    def __len__(self) -> int:
        return len(self.titles)


def make_catalog(num_items: int, generator: np.random.Generator) -> Catalog:
    """``num_items`` items spread evenly over as many categories of 10 brands x 6 families x 4 variants as needed."""
    categories = -(-num_items // ITEMS_PER_CATEGORY)
    shape = (categories, BRANDS_PER_CATEGORY, FAMILIES_PER_CATEGORY, VARIANTS)
    slots = np.sort(generator.permutation(categories * ITEMS_PER_CATEGORY)[:num_items])
    category, brand, family, variant = np.unravel_index(slots, shape)
    brand_words = np.stack([generator.permutation(len(_BRANDS))[:BRANDS_PER_CATEGORY] for _ in range(categories)])
    family_number = category * FAMILIES_PER_CATEGORY + family
    rank = generator.permutation(num_items) + 1
    weights = 1.0 / (rank + 10.0) ** 0.8  # Zipf-Mandelbrot: a head without a single dominating item
    brand_number = brand_words[category, brand]
    return Catalog(
        titles=_titles(category, brand, family_number, variant, brand_number, generator),
        category_I=category,
        brand_I=brand_number,
        family_I=family_number,
        popularity_I=weights / weights.sum(),
        successors_IS=_successors(slots, shape, generator),
        brand_names=_BRANDS,
        category_names=[f"Department {number + 1}" for number in range(categories)],
    )


def _titles(
    category: np.ndarray,
    brand: np.ndarray,
    family: np.ndarray,
    variant: np.ndarray,
    brand_number: np.ndarray,
    generator: np.random.Generator,
) -> list[str]:
    """Brand, line of the brand in this category, material, noun, size: two items never get the same title."""
    categories = int(category[-1]) + 1
    pairs = generator.permutation(len(_MATERIALS) * len(_NOUNS))
    sizes = [generator.permutation(len(_SIZES))[:VARIANTS] for _ in range(categories)]
    lines = generator.integers(len(_LINES), size=(categories, BRANDS_PER_CATEGORY))
    titles = []
    for c, b, f, v, word in zip(category, brand, family, variant, brand_number, strict=True):
        material, noun = divmod(int(pairs[f % len(pairs)]), len(_NOUNS))
        series = f" Series {f // len(pairs) + 1}" if f >= len(pairs) else ""
        product = f"{_MATERIALS[material]} {_NOUNS[noun]}{series}"
        titles.append(f"{_BRANDS[word]} {_LINES[lines[c, b]]} {product} {_SIZES[sizes[c][v]]}")
    return titles


def _successors(slots: np.ndarray, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """The rule that a model can learn from titles: same brand and size, the family that follows; then weaker ties."""
    category, brand, family, variant = np.unravel_index(slots, shape)
    # Two successor families per family: steps along one random cycle through the families of each category.
    cycle = np.stack([generator.permutation(FAMILIES_PER_CATEGORY) for _ in range(shape[0])])
    position = np.argsort(cycle, axis=1)[category, family]
    first = cycle[category, (position + 1) % FAMILIES_PER_CATEGORY]
    second = cycle[category, (position + 2) % FAMILIES_PER_CATEGORY]
    rival, larger = (brand + 1) % BRANDS_PER_CATEGORY, (variant + 1) % VARIANTS
    wanted_SI = [
        (brand, first, variant),
        (brand, second, variant),
        (brand, family, larger),
        (rival, first, variant),
        (brand, first, larger),
        (brand, second, larger),
    ]
    wanted_IS = np.stack([np.ravel_multi_index((category, *indices), shape) for indices in wanted_SI], axis=1)
    # A slot without an item stands for the next slot that has one.
    successor_IS = np.searchsorted(slots, wanted_IS) % len(slots)
    own = np.arange(len(slots))[:, None]
    return np.where(successor_IS == own, (own + 1) % len(slots), successor_IS)
