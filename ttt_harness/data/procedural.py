"""Eight BBH tasks whose examples are made by a program: they need no download, and no model has seen them.

Each task asks in the words and the format of its BBH twin, and bears its name. A task YAML names `load_procedural` as
its `custom_dataset`, and the task in its `dataset_kwargs`. As with BBH, the data set is one split, `test`, and the
metadata key `seed` only decides which examples become the demonstrations; other examples come from `data_seed`.

The examples of a task depend on the task's name and `data_seed` alone (random numbers of the standard library, no
sets, no hashes), and the first n of a longer data set are the data set of n. The kinds of answer, or where answers have
no kinds, of question, are dealt out like cards, so that every stretch of a data set has about as many of each.

Sequences are at most as long as those of BBH, and mostly shorter, so that ten of them fit a small model's context.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import datasets

from ttt_harness.errors import ConfigError

# A kind's examples are used up, or nearly, when this many draws in a row bring nothing new: then they repeat.
_MAX_DRAWS = 200


def load_procedural(
    *,
    procedural_task: str,
    num_examples: int = 250,
    data_seed: int = 0,
    **metadata: Any,  # noqa: ARG001
) -> datasets.DatasetDict:
    """Generate the data set of one procedural task; lm-eval calls it with the task's metadata and dataset_kwargs.

    Args:
        procedural_task: one of `PROCEDURAL_TASKS`.
        num_examples: how many examples, demonstrations included.
        data_seed: another seed, other examples.
        metadata: what lm-eval passes to every custom data set; the examples do not depend on it.

    Returns:
        One split, `test`, with the string columns `input` and `target`.

    Raises:
        ConfigError: an unknown task, or a number of examples or a seed that is none.
    """
    return datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(generate_examples(procedural_task, num_examples, data_seed))}
    )


def generate_examples(procedural_task: str, num_examples: int, data_seed: int) -> list[dict[str, str]]:
    """Generate the examples of one task as a list of `{"input": ..., "target": ...}`; see `load_procedural`.

    No input comes twice, as long as the task has enough different ones.
    """
    if procedural_task not in _TASKS:
        raise ConfigError(f"There is no procedural task {procedural_task!r}: use one of {', '.join(_TASKS)}.")
    if type(num_examples) is not int or num_examples < 1:
        raise ConfigError(f"num_examples is {num_examples!r}, but must be a whole number of at least 1.")
    if type(data_seed) is not int:
        raise ConfigError(f"data_seed is {data_seed!r}, but must be a whole number.")
    task = _TASKS[procedural_task]
    rng = Random(f"{procedural_task} {data_seed}")
    examples = []
    seen = set()
    deck: list[Any] = []
    for _ in range(num_examples):
        if not deck:
            deck = rng.sample(task.kinds, len(task.kinds))
        kind = deck.pop()
        for _ in range(_MAX_DRAWS):
            text, target = task.draw(rng, kind)
            if text not in seen:
                break
        seen.add(text)
        examples.append({"input": text, "target": target})
    return examples


# --- boolean_expressions: the kind is the value ----------------------------------------------------------------------

# Every expression of the BBH twin has 8 words, counting brackets and operators.
_BOOLEAN_WORDS = 8


def _boolean_expressions(rng: Random, kind: bool) -> tuple[str, str]:
    while True:
        words, value = _disjunction(rng, _BOOLEAN_WORDS)
        if value == kind:
            return f"{words} is", str(value)


# One function for each level of precedence, so that the text means what its parts were computed to be. Each returns
# an expression of exactly `length` words, and its value.
def _disjunction(rng: Random, length: int) -> tuple[str, bool]:
    if length >= 3 and rng.random() < 0.4:
        first_length = rng.randint(1, length - 2)
        first, first_value = _conjunction(rng, first_length)
        rest, rest_value = _disjunction(rng, length - 1 - first_length)
        return f"{first} or {rest}", first_value or rest_value
    return _conjunction(rng, length)


def _conjunction(rng: Random, length: int) -> tuple[str, bool]:
    if length >= 3 and rng.random() < 0.5:
        first_length = rng.randint(1, length - 2)
        first, first_value = _negation(rng, first_length)
        rest, rest_value = _conjunction(rng, length - 1 - first_length)
        return f"{first} and {rest}", first_value and rest_value
    return _negation(rng, length)


def _negation(rng: Random, length: int) -> tuple[str, bool]:
    if length == 1:
        value = rng.random() < 0.5
        return str(value), value
    if length == 2 or rng.random() < 0.6:
        words, value = _negation(rng, length - 1)
        return f"not {words}", not value
    words, value = _disjunction(rng, length - 2)
    return f"( {words} )", value


# --- dyck_languages: the kind is the number of brackets to close -----------------------------------------------------

_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_MOST_BRACKETS = 20


def _dyck_languages(rng: Random, kind: int) -> tuple[str, str]:
    # As many brackets as leave `kind` open, and at least two, the twin's shortest.
    length = rng.randrange(kind if kind > 1 else 3, _MOST_BRACKETS + 1, 2)
    word: list[str] = []
    unclosed: list[str] = []
    for remaining in range(length - 1, -1, -1):
        may_open = len(unclosed) + 1 - kind <= remaining
        may_close = bool(unclosed) and kind - (len(unclosed) - 1) <= remaining
        if may_open and (not may_close or rng.random() < 0.5):
            unclosed.append(rng.choice("([{<"))
            word.append(unclosed[-1])
        else:
            word.append(_CLOSING[unclosed.pop()])
    question = "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: "
    return question + " ".join(word), " ".join(_CLOSING[bracket] for bracket in reversed(unclosed))


# --- multistep_arithmetic_two: the kind is the operator between the two brackets -------------------------------------


def _multistep_arithmetic_two(rng: Random, kind: str) -> tuple[str, str]:
    (left, left_value), (right, right_value) = _four_numbers(rng), _four_numbers(rng)
    values = {"+": left_value + right_value, "-": left_value - right_value, "*": left_value * right_value}
    return f"(({left}) {kind} ({right})) =", str(values[kind])


def _four_numbers(rng: Random) -> tuple[str, int]:
    """Four numbers from -9 to 9 with operators between them, and the value: products before sums."""
    number = rng.randint(-9, 9)
    text, terms = str(number), [number]
    for _ in range(3):
        operator, number = rng.choice("+-*"), rng.randint(-9, 9)
        text += f" {operator} {number}"
        if operator == "*":
            terms[-1] *= number
        else:
            terms.append(number if operator == "+" else -number)
    return text, sum(terms)


# --- navigate: the kind is the answer --------------------------------------------------------------------------------

_DIRECTIONS = {"forward": (0, 1), "right": (1, 0), "backward": (0, -1), "left": (-1, 0)}
_TURNS = {"right": 1, "around": 2, "left": 3}  # in quarters, clockwise
_MOST_STEPS = 10


def _navigate(rng: Random, kind: str) -> tuple[str, str]:
    draw = rng.choice((_facing_forward, _turning))
    # Of fixed length before the answer is looked at; else short walks, which come back more often, would be Yes.
    length = rng.randint(3, 7)
    while True:
        instructions, returns = draw(rng, length)
        if returns == (kind == "Yes"):
            break
    question = "If you follow these instructions, do you return to the starting point? "
    return question + " ".join(instructions) + "\nOptions:\n- Yes\n- No", kind


def _facing_forward(rng: Random, length: int) -> tuple[list[str], bool]:
    """Moves in four directions, without turns. Half of the time the last two are drawn so as to lead back."""
    moves = [(rng.choice(list(_DIRECTIONS)), rng.randint(1, _MOST_STEPS)) for _ in range(length)]
    if rng.random() < 0.5:
        x, y = _displacement(moves[:-2])
        if 0 < abs(x) <= _MOST_STEPS and 0 < abs(y) <= _MOST_STEPS:
            moves[-2:] = [("left" if x > 0 else "right", abs(x)), ("backward" if y > 0 else "forward", abs(y))]
            rng.shuffle(moves)
    instructions = [f"Take {_steps(number)} {direction}." for direction, number in moves]
    return ["Always face forward.", *instructions], _displacement(moves) == (0, 0)


def _displacement(moves: Sequence[tuple[str, int]]) -> tuple[int, int]:
    x = sum(number * _DIRECTIONS[direction][0] for direction, number in moves)
    y = sum(number * _DIRECTIONS[direction][1] for direction, number in moves)
    return x, y


def _turning(rng: Random, length: int) -> tuple[list[str], bool]:
    """Moves straight ahead, and turns."""
    instructions = []
    facing, x, y = 0, 0, 0
    for _ in range(length):
        if rng.random() < 0.6:
            number = rng.randint(1, _MOST_STEPS)
            step_x, step_y = list(_DIRECTIONS.values())[facing]
            x, y = x + number * step_x, y + number * step_y
            instructions.append(f"Take {_steps(number)}.")
        else:
            turn = rng.choice(list(_TURNS))
            facing = (facing + _TURNS[turn]) % 4
            instructions.append(f"Turn {turn}.")
    return instructions, (x, y) == (0, 0)


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


# --- object_counting: the kind is what is counted --------------------------------------------------------------------

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_OBJECTS = {
    "animals": {
        "a bear": "bears",
        "a camel": "camels",
        "a cat": "cats",
        "a chicken": "chickens",
        "a cow": "cows",
        "a dog": "dogs",
        "a donkey": "donkeys",
        "a duck": "ducks",
        "a frog": "frogs",
        "a goat": "goats",
        "a horse": "horses",
        "a mouse": "mice",
        "a pig": "pigs",
        "a rabbit": "rabbits",
        "a sheep": "sheep",
        "a snail": "snails",
        "a turtle": "turtles",
        "an owl": "owls",
    },
    "fruits": {
        "a banana": "bananas",
        "a blackberry": "blackberries",
        "a cherry": "cherries",
        "a fig": "figs",
        "a grape": "grapes",
        "a lemon": "lemons",
        "a mango": "mangoes",
        "a nectarine": "nectarines",
        "a peach": "peaches",
        "a pear": "pears",
        "a plum": "plums",
        "a raspberry": "raspberries",
        "a strawberry": "strawberries",
        "an apple": "apples",
        "an apricot": "apricots",
        "an orange": "oranges",
    },
    "musical instruments": {
        "a banjo": "banjos",
        "a cello": "cellos",
        "a clarinet": "clarinets",
        "a drum": "drums",
        "a flute": "flutes",
        "a guitar": "guitars",
        "a harp": "harps",
        "a piano": "pianos",
        "a saxophone": "saxophones",
        "a trombone": "trombones",
        "a trumpet": "trumpets",
        "a tuba": "tubas",
        "a violin": "violins",
        "an accordion": "accordions",
        "an oboe": "oboes",
    },
    "objects": {
        "a bed": "beds",
        "a bookcase": "bookcases",
        "a car": "cars",
        "a chair": "chairs",
        "a clock": "clocks",
        "a couch": "couches",
        "a desk": "desks",
        "a fridge": "fridges",
        "a kettle": "kettles",
        "a lamp": "lamps",
        "a microwave": "microwaves",
        "a mirror": "mirrors",
        "a stove": "stoves",
        "a table": "tables",
        "a toaster": "toasters",
        "an armchair": "armchairs",
        "an oven": "ovens",
    },
    "vegetables": {
        "a cabbage": "cabbages",
        "a carrot": "carrots",
        "a cauliflower": "cauliflowers",
        "a head of broccoli": "heads of broccoli",
        "a leek": "leeks",
        "a lettuce head": "lettuce heads",
        "a parsnip": "parsnips",
        "a potato": "potatoes",
        "a radish": "radishes",
        "a stalk of celery": "stalks of celery",
        "a turnip": "turnips",
        "a yam": "yams",
        "an artichoke": "artichokes",
        "an onion": "onions",
    },
}


def _object_counting(rng: Random, kind: str) -> tuple[str, str]:
    items = [(kind, thing) for thing in rng.sample(list(_OBJECTS[kind]), rng.randint(2, 8))]
    # A quarter of the questions have up to three things among the others that do not count; where all objects count
    # there is no such thing.
    if kind != "objects" and rng.random() < 0.25:
        other = rng.choice([name for name in _OBJECTS if name != kind])
        items += [(other, thing) for thing in rng.sample(list(_OBJECTS[other]), rng.randint(1, 3))]
        rng.shuffle(items)
    total = 0
    phrases = []
    for name, thing in items:
        number = 1 if rng.random() < 0.7 else rng.choice(list(_NUMBERS))
        phrases.append(thing if number == 1 else f"{_NUMBERS[number]} {_OBJECTS[name][thing]}")
        total += number if name == kind else 0
    return f"I have {', '.join(phrases[:-1])}, and {phrases[-1]}. How many {kind} do I have?", str(total)


# --- tracking_shuffled_objects_three_objects: the kind is the answer -------------------------------------------------


class _Story(NamedTuple):
    opening: str
    has: str
    then: str
    swap: str
    closing: str
    things: tuple[str, ...]
    article: str = ""


_COLORS = ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow")
_STORIES = (
    _Story(
        opening="are friends and avid readers who occasionally trade books. At the start of the semester, they each "
        "buy one new book:",
        has="gets",
        then="As the semester proceeds, they start trading around the new books.",
        swap="swap books",
        closing="At the end of the semester, {} has",
        things=("Dracula", "Emma", "Frankenstein", "Hamlet", "Jane Eyre", "Middlemarch", "Moby Dick", "Ulysses"),
    ),
    _Story(
        opening="are dancers at a square dance. At the start of a song, they each have a partner:",
        has="is dancing with",
        then="Throughout the song, the dancers often trade partners.",
        swap="switch partners",
        closing="At the end of the dance, {} is dancing with",
        things=("Helga", "Izzi", "Jamie", "Karl", "Lola", "Melissa", "Ophelia", "Patrick", "Rodrigo", "Sam"),
    ),
    _Story(
        opening="are playing a game. At the start of the game, they are each holding a ball:",
        has="has",
        then="As the game progresses, pairs of players trade balls.",
        swap="swap balls",
        closing="At the end of the game, {} has the",
        things=tuple(f"{color} ball" for color in _COLORS),
        article="a ",
    ),
    _Story(
        opening="are holding a white elephant gift exchange. At the start of the event, they are each holding a "
        "present of a different color:",
        has="has",
        then="As the event progresses, pairs of people swap gifts.",
        swap="swap their gifts",
        closing="At the end of the event, {} has the",
        things=tuple(f"{color} present" for color in _COLORS),
        article="a ",
    ),
    _Story(
        opening="are on the same team in a soccer match. At the start of the match, they are each assigned to a "
        "position:",
        has="is playing",
        then="As the game progresses, pairs of players occasionally swap positions.",
        swap="trade positions",
        closing="At the end of the match, {} is playing",
        things=("center midfielder", "fullback", "goalkeeper", "left winger", "right winger", "striker"),
    ),
)
_PEOPLE = ("Alice", "Bob", "Claire")


def _tracking_shuffled_objects_three_objects(rng: Random, kind: str) -> tuple[str, str]:
    story = rng.choice(_STORIES)
    things = rng.sample(story.things, 3)
    holds = dict(zip(_PEOPLE, things, strict=True))
    start = [f"{person} {story.has} {story.article}{thing}" for person, thing in holds.items()]
    sentences = []
    last: list[str] = []
    for when in ("First", "Then", "Finally"):
        pair = rng.sample(_PEOPLE, 2)
        while sorted(pair) == sorted(last):  # no swap is undone at once
            pair = rng.sample(_PEOPLE, 2)
        first, second = last = pair
        holds[first], holds[second] = holds[second], holds[first]
        sentences.append(f"{when}, {first} and {second} {story.swap}.")
    # The question is put to whoever ends up with the thing of the wanted letter.
    answer = things["ABC".index(kind)]
    person = next(person for person, thing in holds.items() if thing == answer)
    text = (
        f"Alice, Bob, and Claire {story.opening} {start[0]}, {start[1]}, and {start[2]}.\n"
        f"{story.then} {' '.join(sentences)} {story.closing.format(person)}\nOptions:\n"
    )
    return text + "\n".join(f"({letter}) {thing}" for letter, thing in zip("ABC", things, strict=True)), f"({kind})"


# --- web_of_lies: the kind is the answer -----------------------------------------------------------------------------

_NAMES = (
    "Adela", "Amos", "Benita", "Brice", "Carmen", "Cedric", "Celia", "Clyde", "Dana", "Delia", "Dexter", "Edith",
    "Elmer", "Enid", "Felix", "Flora", "Gavin", "Greta", "Hazel", "Hector", "Imogen", "Ivan", "Jonas", "Judith",
    "Kurt", "Lena", "Leroy", "Lydia", "Marcus", "Mavis", "Miles", "Nadia", "Nelson", "Olga", "Oscar", "Paula",
    "Quentin", "Ramona", "Rufus", "Selma", "Simon", "Tabitha", "Theo", "Ursula", "Victor", "Wanda", "Wilbur", "Yvonne",
)  # fmt: skip


def _web_of_lies(rng: Random, kind: str) -> tuple[str, str]:
    people = rng.sample(_NAMES, 5)
    honest = [rng.random() < 0.5 for _ in people[:-1]] + [kind == "Yes"]
    sentences = [f"{people[0]} {_tells(honest[0])}."]
    for i in range(1, len(people)):
        # Who tells the truth says what the one before does; who lies says the contrary.
        sentences.append(f"{people[i]} says {people[i - 1]} {_tells(honest[i] == honest[i - 1])}.")
    return f"Question: {' '.join(sentences)} Does {people[-1]} tell the truth?", kind


def _tells(honest: bool) -> str:
    return "tells the truth" if honest else "lies"


# --- word_sorting: the kind is the number of words -------------------------------------------------------------------

# Lower-case ASCII letters only, so that the order of the alphabet is the order of the characters.
_WORDS = tuple(
    """
    abacus acorn actor agile almond amber anchor angle apron arch arrow atlas autumn avenue badge badger baker balcony
    bamboo banner barley barrel basin basket beacon beaker beaver bellow bench berry bishop blanket blossom border
    bottle boulder branch bridge bright bronze brook bucket buffalo bundle butter button cabin cable cactus candle
    canvas canyon captain carbon cargo carpet castle cedar cellar chalk channel chapel charcoal cheese chimney chorus
    cinder circle clever cliff cloud clover cobalt coffee collar comet compass copper coral corner cotton cradle crane
    crater crayon cricket crown crystal curtain cushion dagger daisy dawn debate decoy delta desert diary dinner dolphin
    domino dragon drawer drift eagle early earth echo eclipse elbow elder ember emerald empty engine envelope epoch
    equal errand ethics evening fable fabric falcon famous farmer feather fence fern fiddle figure filter finger flame
    flannel flower fluent forest fossil fountain fragile freight frozen funnel galaxy gallon garden garnet gather gentle
    geyser ginger glacier glider globe goblet golden gossip granite gravel grocer guitar gutter hammer hamlet harbor
    harvest hawk helmet herring hollow honest honey horizon hostel humble hunter hurdle icicle ideal igloo impact indigo
    insect iron island ivory jacket jaguar jasmine jersey jewel jigsaw journal jungle juniper keeper kernel kettle
    kidney kingdom kitchen kitten knight ladder lagoon lantern lattice launch laurel lavender leather legend lemon
    library lilac linen lizard lobster locket lumber lunar magnet magpie mammal mantle maple marble margin market meadow
    medal melody merchant meteor mineral mirror mitten modest monsoon morning mosaic mountain muffin museum mustard
    napkin narrow needle nephew nickel noble nomad northern notebook novel nutmeg oasis oboe ocean olive onyx opera
    orbit orchard organ osprey otter outlet oxygen oyster paddle palace panther paper parade parcel parrot pastry
    pebble pelican pencil pepper pewter pigment pillow pioneer planet plaster plumber pocket polite pollen portrait
    powder prairie prism puddle pumpkin puzzle quarry quartz quiet quill quiver radar radish raft raven ribbon riddle
    ripple river robin rocket rooster rosemary rudder rustic saddle saffron salmon sandal satin scarlet scholar school
    season shadow shelter shield silver sketch slender socket solar sparrow spider spiral sponge spruce stable statue
    stencil stream sturdy summit sunset swallow symbol table tailor talent tambour teapot temple tender thicket thimble
    thistle thunder timber tinder toffee torch tower trellis trophy trumpet tulip tundra tunnel turbine turtle twilight
    umbrella uncle unit upper urban usher vacant valley vanilla velvet vendor verse vessel village vinegar violet
    visitor volcano voyage waffle wagon walnut walrus warden weaver wedge whisper whistle willow window winter wisdom
    wizard wonder woolen yarn yeast yellow yogurt zebra zenith zephyr zigzag zipper
    """.split()  # noqa: SIM905
)


def _word_sorting(rng: Random, kind: int) -> tuple[str, str]:
    words = rng.sample(_WORDS, kind)
    return f"Sort the following words alphabetically: List: {' '.join(words)}", " ".join(sorted(words))


class _Task(NamedTuple):
    kinds: Sequence[Any]
    draw: Callable[[Random, Any], tuple[str, str]]


_TASKS = {
    "boolean_expressions": _Task((True, False), _boolean_expressions),
    "dyck_languages": _Task((1, 2, 3), _dyck_languages),
    "multistep_arithmetic_two": _Task(("+", "-", "*"), _multistep_arithmetic_two),
    "navigate": _Task(("Yes", "No"), _navigate),
    "object_counting": _Task(tuple(_OBJECTS), _object_counting),
    "tracking_shuffled_objects_three_objects": _Task(("A", "B", "C"), _tracking_shuffled_objects_three_objects),
    "web_of_lies": _Task(("Yes", "No"), _web_of_lies),
    "word_sorting": _Task(range(2, 9), _word_sorting),
}
PROCEDURAL_TASKS = tuple(_TASKS)
