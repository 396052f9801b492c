"""Customer messages and the orders in them: free text to JSON with given keys.

What an online shop's inbox holds, made by a seeded generator. Train and test share no combination of
customer, item and city, so a test message is never one that was trained on.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

KEYS = ("name", "city", "item", "quantity", "color")

SYSTEM = f"Turn the customer's message into JSON with the keys {', '.join(KEYS)}."

NAMES: Sequence[str] = (
    "Anna Keller", "Tom Brown", "Maria Silva", "Kenji Mori", "Lena Fischer", "Omar Haddad",
    "Julia Novak", "Peter Olsen", "Chloe Martin", "David Cohen", "Priya Nair", "Sara Lind",
    "Marco Rossi", "Emily Clark", "Ivan Petrov", "Noah Evans", "Grace Kim", "Felix Braun",
    "Nina Costa", "Hugo Blanc", "Amir Khan", "Ella Young", "Lucas Meyer", "Zoe Turner",
)  # fmt: skip
CITIES: Sequence[str] = (
    "Oslo", "Berlin", "Lisbon", "Kyoto", "Vienna", "Cairo", "Prague", "Bergen", "Lyon", "Boston",
    "Madrid", "Turin", "Denver", "Sofia", "Dublin", "Seoul", "Geneva", "Porto", "Leeds", "Austin",
)  # fmt: skip
ITEMS: Sequence[str] = (
    "mug", "chair", "lamp", "towel", "bowl", "pillow", "basket", "blanket", "vase", "plate",
    "curtain", "candle", "shelf", "rug", "clock", "stool",
)  # fmt: skip
COLORS: Sequence[str] = ("red", "blue", "green", "white", "black", "yellow", "grey", "orange")
NUMBERS: Sequence[str] = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip

TEMPLATES: Sequence[str] = (
    "Hi, this is {name} from {city}. I would like {count} {color} {item}, please.",
    "Please send {count} {color} {item} to {name} in {city}. Thanks!",
    "Hello, could you ship {count} {item} in {color} to {city}? The name is {name}.",
    "{name} here. I need {count} {color} {item}; my address is in {city}.",
    "Good morning, I want to order {count} {item}, colour {color}. Deliver to {name}, {city}.",
    "Can {name} in {city} still get {count} of the {color} {item}?",
    "We are out of {item} again. {count} {color} ones for {name}, {city} office, please.",
    "Dear team, last time the {item} never came. Send {count} in {color} to me, {name}, in {city}.",
    "To {city} please: {count} {color} {item}. Bill it to {name}.",
    "My sister {name} moved to {city} and wants {count} {color} {item}.",
)


def _message(draw: random.Random, name: str, item: str, city: str) -> tuple[str, str]:
    quantity = draw.randint(1, 12)
    color = draw.choice(COLORS)
    plural = item if quantity == 1 else {"shelf": "shelves"}.get(item, f"{item}s")
    count = NUMBERS[quantity - 1] if draw.random() < 0.5 else str(quantity)
    text = draw.choice(TEMPLATES).format(
        name=name, city=city, item=plural, color=color, count=count
    )
    values = (name, city, item, quantity, color)
    return text[0].upper() + text[1:], json.dumps(dict(zip(KEYS, values)))


def write_orders(path: Path, count: int, seed: int, test: bool) -> Path:
    """Write `count` chats as JSONL; test and train draw from disjoint halves of all combinations."""
    draw = random.Random(f"{seed}-{test}")
    lines: list[str] = []
    while len(lines) < count:
        who, what, where = (draw.randrange(len(pool)) for pool in (NAMES, ITEMS, CITIES))
        # A checkerboard over the combinations: each value occurs on both sides, no triple does.
        if ((who + what + where) % 2 == 1) != test:
            continue
        text, order = _message(draw, NAMES[who], ITEMS[what], CITIES[where])
        turns = (("system", SYSTEM), ("user", text), ("assistant", order))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
