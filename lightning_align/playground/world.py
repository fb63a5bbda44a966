"""The words of the playground: about 250 of them, in lower case, and what they have to do with each other."""

from collections.abc import Iterable
from functools import lru_cache

KINDS: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "horse", "bird", "cow", "duck", "fish", "pig"),
    "colors": ("red", "blue", "green", "black", "white"),
    "fruits": ("apple", "banana", "cherry", "lemon", "plum"),
    "tools": ("hammer", "saw", "drill", "brush", "rope"),
    "foods": ("bread", "rice", "soup", "cheese", "cake"),
    "clothes": ("coat", "hat", "shirt", "sock", "dress"),
    "things": ("bike", "ball", "book", "phone", "lamp"),
    "places": ("park", "school", "house", "river", "garden"),
}
KIND_OF: dict[str, str] = {item: kind for kind, items in KINDS.items() for item in items}
ITEMS: tuple[str, ...] = tuple(KIND_OF)
NUMBERS: tuple[str, ...] = (*("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),)
VALUE_OF: dict[str, int] = {word: value for value, word in enumerate(NUMBERS)}
PERSONS = ("sister", "brother", "friend", "teacher", "mother", "doctor")
OWNERS = ("my", "our", "the")
DESCRIBABLE = (*KINDS["animals"], *KINDS["foods"], *KINDS["clothes"], *KINDS["things"], *KINDS["places"])

ADJECTIVES = (*("big", "small", "soft", "happy", "fast", "slow", "old", "new"),)
KIND_WORDS = ("kind", "brave", "clever", "lovely", "great", "funny")
RUDE_WORDS = ("stupid", "ugly", "boring", "useless", "lazy", "awful")

# A made-up language that only the corpus explains.
CODE: dict[str, str] = {
    **{
        "zib": "cat",
        "mok": "dog",
        "fen": "red",
        "gav": "blue",
        "pim": "apple",
        "sut": "bread",
        "ral": "house",
        "kep": "hat",
    },
}
CODED: dict[str, str] = {plain: code for code, plain in CODE.items()}

# What one can do to what, and with the help of what.
USEFUL: dict[str, tuple[str, ...]] = {
    "feed": ("bread", "rice", "water", "bowl"),
    "clean": ("water", "soap", "brush", "cloth"),
    "fix": ("hammer", "drill", "glue", "rope"),
    "draw": ("paper", "pencil", "ink", "brush"),
    "find": ("map", "lamp", "luck", "patience"),
}
OBJECTS: dict[str, tuple[str, ...]] = {
    "feed": KINDS["animals"],
    "clean": (*KINDS["things"], *KINDS["clothes"]),
    "fix": KINDS["things"],
    "draw": (*KINDS["animals"], *KINDS["places"], *KINDS["fruits"]),
    "find": (*KINDS["animals"], *KINDS["clothes"], *KINDS["places"]),
}
USEFUL_WORDS: tuple[str, ...] = tuple(dict.fromkeys(word for words in USEFUL.values() for word in words))

HARMS = ("hurt", "scare", "tease")  # asked for; naming them while declining is harmless
METHODS: dict[str, tuple[str, ...]] = {
    "harm": ("kick", "hit", "chase", "poke"),
    "theft": ("grab", "sneak", "hide", "break"),
    "insult": RUDE_WORDS,
}
HARMFUL_WORDS = (*METHODS["harm"], *METHODS["theft"])
OFFERS: dict[str, tuple[str, ...]] = {
    "harm": ("feed", "help", "draw"),
    "theft": ("buy", "borrow", "share"),
    "insult": ("praise", "thank", "help"),
}
DECLINES = ("i can not", "i will not", "i must not")

OPENERS = ("sure ,", "of course ,", "here you go :", "happy to help .", "great question .", "yes , gladly .")
CLOSERS = (
    *("i hope this helps .", "have a nice day .", "thank you for asking .", "you are welcome .", "ask me again ."),
    "please enjoy .",
)
POLITE_PHRASES: tuple[str, ...] = (*OPENERS, *CLOSERS)

PUNCTUATION = (".", ",", ":", "?")
# Words that hold a sentence together: they never count as off-topic.
FUNCTION_WORDS = (
    *("a", "an", "the", "my", "our", "i", "you", "it", "is", "are", "of", "and", "or"),
    *("not", "no", "yes", "in", "at", "to", "with", "for", "from", "there", "this", "that", "these"),
    *("can", "could", "will", "must", "do", "have", "use", "me", "so", "very"),
    *("think", "sorry", "instead", "help", "answer", "next", "word", "means"),
)
# Words that no answer needs.
FILLERS = (
    *("maybe", "well", "also", "like", "some", "about", "way", "night", "order", "now", "then", "here", "does"),
    *("mean", "words"),
)
INSTRUCTION_WORDS = (
    *("list", "name", "give", "but", "say", "something", "write", "sentence", "praise", "reverse", "sort", "numbers"),
    *("put", "backwards", "how", "many", "times", "appear", "complete", "pattern", "what", "comes", "exactly"),
    *("translate", "code", "describe", "using", "tell", "insult", "steal"),
)
JUDGE_WORDS = (
    *("critique", "safe", "helpful", "clear", "rude", "wrong", "long", "too", "harmful", "make", "first"),
    *("second", "which", "better", "safer", "more", "rating", "repeats", "itself", "polite"),
)


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that a record can contain, sorted."""
    groups: tuple[Iterable[str], ...] = (
        *(ITEMS, KINDS, NUMBERS, PERSONS, OWNERS, ADJECTIVES, KIND_WORDS, RUDE_WORDS, CODE, USEFUL, USEFUL_WORDS),
        *(HARMS, HARMFUL_WORDS, PUNCTUATION, FUNCTION_WORDS, FILLERS, INSTRUCTION_WORDS, JUDGE_WORDS),
        *OFFERS.values(),
        *(phrase.split() for phrase in (*POLITE_PHRASES, *DECLINES)),
    )
    return tuple(sorted({word for group in groups for word in group}))
