"""Multi-step word problems with worked answers, made by code from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

NAMES = (
    "Ada Ben Chloe Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quinn Rosa Sam Tara Uma "
    "Victor Wendy "
    "Xavier Yara Zoe Amir Bella Carlos Diana Erik Fatima"
).split()
THINGS = (
    "apples books pencils marbles stickers coins cards shells stamps buttons cookies oranges tickets "
    "stones flowers "
    "cups toys bottles candles ribbons"
).split()
PLACES = "shop library school farm market bakery museum garden factory kitchen".split()
Problem = tuple[str, str]


def _answer(steps: list[str], result: str) -> str:
    lines = [f"Step {i}: {step}" for i, step in enumerate(steps, 1)]
    return "\n".join([*lines, f"The answer is {result}."])


def _shopping(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price, paid = rng.randint(2, 12), rng.randint(2, 15), 0
    cost = count * price
    paid = cost + rng.randint(1, 40)
    question = (
        f"{name} buys {count} {thing} for {price} dollars each and pays with {paid} dollars. "
        f"How much change does {name} get?"
    )
    steps = [
        f"The {thing} cost {count} * {price} = {cost} dollars.",
        f"The change is {paid} - {cost} = {paid - cost} dollars.",
    ]
    return question, _answer(steps, f"{paid - cost} dollars")


def _give_away(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start, found, given = rng.randint(20, 90), rng.randint(5, 60), rng.randint(3, 20)
    total = start + found
    question = (
        f"{first} has {start} {thing}. {first} finds {found} more and then gives {given} of them to "
        f"{second}. "
        f"How many {thing} does {first} have now?"
    )
    steps = [
        f"After finding more, {first} has {start} + {found} = {total} {thing}.",
        f"After giving {given} to {second}, {first} has {total} - {given} = {total - given} {thing}.",
    ]
    return question, _answer(steps, f"{total - given} {thing}")


def _sharing(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, friends = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 9)
    total = boxes * each
    share, rest = divmod(total, friends)
    question = (
        f"{name} has {boxes} boxes with {each} {thing} in each box and shares them equally among "
        f"{friends} friends. "
        f"How many {thing} does each friend get, and how many are left over?"
    )
    steps = [
        f"There are {boxes} * {each} = {total} {thing} in all.",
        f"Each friend gets {total} // {friends} = {share} {thing}.",
        f"Left over are {total} - {friends} * {share} = {rest} {thing}.",
    ]
    return question, _answer(steps, f"{share} {thing} each and {rest} left over")


def _travel(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    vehicle = rng.choice(["car", "train", "bus", "bicycle"])
    speed_1, hours_1, speed_2, hours_2 = (
        rng.randint(2, 9) * 10,
        rng.randint(2, 6),
        rng.randint(2, 9) * 10,
        rng.randint(2, 6),
    )
    part_1, part_2 = speed_1 * hours_1, speed_2 * hours_2
    question = (
        f"{name} travels by {vehicle} for {hours_1} hours at {speed_1} km per hour and then for {hours_2} "
        f"hours at "
        f"{speed_2} km per hour. How far does {name} travel?"
    )
    steps = [
        f"The first part is {hours_1} * {speed_1} = {part_1} km.",
        f"The second part is {hours_2} * {speed_2} = {part_2} km.",
        f"Together this is {part_1} + {part_2} = {part_1 + part_2} km.",
    ]
    return question, _answer(steps, f"{part_1 + part_2} km")


def _rectangle(rng: random.Random) -> Problem:
    width, height = rng.randint(3, 19), rng.randint(3, 19)
    what = rng.choice(["garden", "room", "field", "poster", "table"])
    ask = rng.choice(["perimeter", "area"])
    question = f"A rectangular {what} is {width} m wide and {height} m long. What is its {ask}?"
    if ask == "area":
        steps = ["The area is width times length.", f"{width} * {height} = {width * height}."]
        return question, _answer(steps, f"{width * height} square metres")
    total = width + height
    steps = [
        f"Width plus length is {width} + {height} = {total} m.",
        f"The perimeter is 2 * {total} = {2 * total} m.",
    ]
    return question, _answer(steps, f"{2 * total} m")


def _equation(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 12), rng.randint(2, 20), rng.randint(1, 40)
    letter = rng.choice("xyzn")
    c = a * x + b
    question = f"Solve for {letter}: {a}{letter} + {b} = {c}."
    steps = [
        f"Subtract {b} from both sides: {a}{letter} = {c} - {b} = {c - b}.",
        f"Divide both sides by {a}: {letter} = {c - b} / {a} = {x}.",
    ]
    return question, _answer(steps, f"{letter} = {x}")


def _percent(rng: random.Random) -> Problem:
    name, thing = (
        rng.choice(NAMES),
        rng.choice(["coat", "lamp", "bag", "phone", "chair", "bicycle", "jacket", "desk"]),
    )
    price, percent = rng.randint(2, 30) * 10, rng.choice([10, 20, 30, 40, 50])
    off = price * percent // 100
    question = (
        f"A {thing} costs {price} dollars. {name} gets a discount of {percent} percent. How much "
        f"does {name} pay?"
    )
    steps = [
        f"The discount is {price} * {percent} / 100 = {off} dollars.",
        f"The price after the discount is {price} - {off} = {price - off} dollars.",
    ]
    return question, _answer(steps, f"{price - off} dollars")


def _work_week(rng: random.Random) -> Problem:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    hours, days, wage, spent = rng.randint(3, 9), rng.randint(2, 6), rng.randint(8, 20), rng.randint(10, 45)
    total = hours * days
    earned = total * wage
    question = (
        f"{name} works at the {place} for {hours} hours a day on {days} days and earns {wage} dollars per "
        f"hour. "
        f"{name} then spends {spent} dollars. How much money is left?"
    )
    steps = [
        f"{name} works {hours} * {days} = {total} hours.",
        f"{name} earns {total} * {wage} = {earned} dollars.",
        f"After spending {spent} dollars, {earned} - {spent} = {earned - spent} dollars are left.",
    ]
    return question, _answer(steps, f"{earned - spent} dollars")


def _average(rng: random.Random) -> Problem:
    name, count = rng.choice(NAMES), rng.randint(3, 5)
    mean = rng.randint(5, 20)
    scores = [mean + rng.randint(-4, 4) for _ in range(count - 1)]
    scores.append(mean * count - sum(scores))
    total = mean * count
    listed = ", ".join(map(str, scores))
    question = f"{name} scores {listed} points in {count} games. What is the average score?"
    steps = [
        f"The sum is {' + '.join(map(str, scores))} = {total}.",
        f"Divide by the number of games: {total} / {count} = {mean}.",
    ]
    return question, _answer(steps, f"{mean} points")


def _sequence(rng: random.Random) -> Problem:
    start, step, shown = rng.randint(1, 30), rng.randint(2, 12), rng.randint(4, 6)
    values = [start + step * i for i in range(shown + 2)]
    question = f"What are the next two numbers: {', '.join(map(str, values[:shown]))}?"
    steps = [
        f"Each number is {step} more than the one before: {values[1]} - {values[0]} = {step}.",
        f"The next number is {values[shown - 1]} + {step} = {values[shown]}.",
        f"The number after it is {values[shown]} + {step} = {values[shown + 1]}.",
    ]
    return question, _answer(steps, f"{values[shown]} and {values[shown + 1]}")


def _compare(rng: random.Random) -> Problem:
    first, second, third = rng.sample(NAMES, 3)
    thing = rng.choice(THINGS)
    base, factor, more = rng.randint(3, 25), rng.randint(2, 6), rng.randint(2, 20)
    b, c = base * factor, base * factor + more
    question = (
        f"{first} has {base} {thing}. {second} has {factor} times as many as {first}, and {third} has "
        f"{more} more than "
        f"{second}. How many {thing} do they have together?"
    )
    steps = [
        f"{second} has {base} * {factor} = {b} {thing}.",
        f"{third} has {b} + {more} = {c} {thing}.",
        f"Together they have {base} + {b} + {c} = {base + b + c} {thing}.",
    ]
    return question, _answer(steps, f"{base + b + c} {thing}")


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _shopping,
    _give_away,
    _sharing,
    _travel,
    _rectangle,
    _equation,
    _percent,
    _work_week,
    _average,
    _sequence,
    _compare,
)


def math_problems(seed: int) -> Iterator[Problem]:
    """An endless, seeded stream of (question, worked answer); the templates take turns at random."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(TEMPLATES)(rng)
