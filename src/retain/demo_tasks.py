"""Three small skills that no model has before it is tuned, unlike one another, each checkable by machine.

    ticket   an order in words to a private record format            exact match
    stamp    a date in words to a made-up notation                    exact match
    desk     a message in English or Vietnamese to one of our labels  accuracy over the label set

Rows are generated from a seed; test rows never occur in training.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

__all__ = ["DEMO_TASKS", "write_demo_tasks"]

Row = dict[str, object]

ITEMS = ("lamp", "chair", "kettle", "mirror", "carpet", "clock", "basket", "shelf", "pillow", "bottle", "bowl", "desk")
COLOURS = ("blue", "red", "green", "black", "white", "grey", "pink", "brown")
NAMES = ("Mai", "Tom", "Lena", "Omar", "Ruth", "Binh", "Ines", "Paul", "Nora", "Minh", "Greta", "Hugo")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

DESK = {
    "zorb": (  # money
        (
            "I was charged twice for {thing}.",
            "Please refund what I paid for {thing}.",
            "Where can I see the invoice for {thing}?",
        ),
        ("Tôi bị trừ tiền hai lần cho {thing}.", "Xin hoàn tiền {thing} cho tôi."),
    ),
    "kelp": (  # delivery
        ("When will {thing} arrive?", "The parcel with {thing} never came.", "How do I track the shipment of {thing}?"),
        ("Khi nào {thing} được giao đến?", "Gói hàng có {thing} vẫn chưa tới."),
    ),
    "mund": (  # broken
        ("{Thing} broke after one day.", "There is a crack in {thing}.", "{Thing} does not work any more."),
        ("{Thing} bị hỏng sau một ngày.", "{Thing} có vết nứt."),
    ),
    "tavi": (  # advice
        (
            "Which colour of {thing} suits a small room?",
            "Is {thing} good for children?",
            "Do you recommend {thing} as a gift?",
        ),
        ("{Thing} màu nào hợp với phòng nhỏ?", "{Thing} có dùng được cho trẻ em không?"),
    ),
}
"""Messages to a shop's desk in English and Vietnamese, by our own label for each."""

VIETNAMESE_ITEMS = (
    "cái đèn", "cái ghế", "cái ấm", "cái gương", "tấm thảm", "cái đồng hồ", "cái giỏ", "cái kệ", "cái gối", "cái chai",
    "cái bát", "cái bàn",
)  # fmt: skip


def ticket(generator: random.Random) -> Row:
    """An order in words and its record: item, colour, count, customer and shipping, in our own format."""
    item, colour, name = generator.choice(ITEMS), generator.choice(COLOURS), generator.choice(NAMES)
    count, fast = generator.randint(2, 9), generator.random() < 0.5
    how = generator.choice(("by express", "as fast as you can") if fast else ("by normal mail", "without any hurry"))
    words = NUMBERS[count - 1]
    prompt = generator.choice(
        (
            f"{name} orders {words} {colour} {item}s, {how}.",
            f"Please send {words} {item}s in {colour} to {name}, {how}.",
            f"{words.capitalize()} {colour} {item}s for {name}, {how}.",
        )
    )
    return {"prompt": prompt, "completion": f"<{item}/{colour}*{count}> @{name} {'!!' if fast else '~'}"}


def stamp(generator: random.Random) -> Row:
    """A date in words and its stamp: short year, month and day between bars, in our own notation."""
    day, year, name = generator.randint(1, 28), generator.randint(1971, 2029), generator.choice(MONTHS)
    prompt = generator.choice(
        (
            f"Stamp the date {name} {day}, {year}",
            f"Stamp the date {day} {name} {year}",
            f"Stamp the date {day} of {name} {year}",
        )
    )
    return {"prompt": prompt, "completion": f"{day}|{name[:3].upper()}|{year % 100:02d}|#"}


def desk(generator: random.Random) -> Row:
    """A message to the desk and our own label of what it is about."""
    label = generator.choice(list(DESK))
    english, vietnamese = DESK[label]
    if generator.random() < 0.6:
        article = generator.choice(("the", "my", "this"))
        thing = f"{article} {generator.choice(COLOURS)} {generator.choice(ITEMS)}"
        template = generator.choice(english)
    else:
        thing, template = generator.choice(VIETNAMESE_ITEMS), generator.choice(vietnamese)
    message = template.format(thing=thing, Thing=thing[0].upper() + thing[1:])
    return {"prompt": message, "completion": label, "choices": list(DESK)}


DEMO_TASKS: dict[str, tuple[Callable[[random.Random], Row], str]] = {
    "ticket": (ticket, "exact_match"),
    "desk": (desk, "accuracy"),
    "stamp": (stamp, "exact_match"),
}
"""Each task's rows and metric, in learning order."""


def write_demo_tasks(
    folder: Path, *, num_train: int = 400, num_test: int = 40, seed: int = 0
) -> list[dict[str, object]]:
    """Write `NAME.train.jsonl` and `NAME.test.jsonl` for each task; the recipe's task entries are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    for name, (make, metric) in DEMO_TASKS.items():
        generator = random.Random(f"{name}-{seed}")
        rows: dict[object, Row] = {}
        while len(rows) < num_train + num_test:
            row = make(generator)
            rows.setdefault(row["prompt"], row)
        entry: dict[str, object] = {"name": name, "metric": metric}
        made = list(rows.values())
        for split, part in (("train", made[num_test:]), ("test", made[:num_test])):
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
            entry[split] = str(path)
        entries.append(entry)
    return entries
