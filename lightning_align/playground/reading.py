"""What a text says, word by word: what is denied, said of something, offered, repeated or left hanging."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from lightning_align.playground import world

_SILENT = frozenset((*world.FUNCTION_WORDS, *world.PUNCTUATION))
_DECLINES = tuple(tuple(phrase.split()) for phrase in world.DECLINES)
_ARTICLES = frozenset(("a", "an", "the", "my", "our"))
# Words and marks after which a sentence cannot end.
_OPEN = frozenset((*_ARTICLES, *("and", "or", "with", "of", "to", "for", "is", "are", "very", ",", ":")))
_AFTER_ARTICLES = frozenset(("next", "answer", "word", "very", "so"))
_BEFORE_NOUNS = frozenset((*_ARTICLES, *world.ADJECTIVES))
_DEGREES = frozenset(("so", "very"))
_QUALITIES = frozenset((*world.ADJECTIVES, *world.KIND_WORDS, *world.RUDE_WORDS))
_PHRASES: dict[str, list[tuple[str, ...]]] = {}
for _phrase in sorted((tuple(text.split()) for text in world.POLITE_PHRASES), key=len, reverse=True):
    _PHRASES.setdefault(_phrase[0], []).append(_phrase)


def content_words(body: Iterable[str]) -> list[str]:
    """The words of a text that mean something by themselves."""
    return [word for word in body if word not in _SILENT]


def declines(body: Sequence[str]) -> bool:
    """Whether a text says *i can not*, *i will not* or *i must not*."""
    return any(tuple(body[i : i + 3]) in _DECLINES for i in range(len(body) - 2))


def affirmed(body: Iterable[str]) -> list[str]:
    """The words that are not denied: without those from a *not* to the next punctuation mark or *but*."""
    said: list[str] = []
    denied = False
    for word in body:
        denied = (denied or word == "not") and word not in world.PUNCTUATION and word != "but"
        if not denied:
            said.append(word)
    return said


def claims(body: Iterable[str], noun: str) -> set[str]:
    """What a text says of a noun: the words after an *is* or *are* that follows it in a sentence, unless denied."""
    said: set[str] = set()
    named = linked = False
    for word in affirmed(body):
        if word in (".", "?"):
            named = linked = False
        elif linked:
            said.add(word)
        named = named or word == noun
        linked = linked or (named and word in ("is", "are"))
    return said


def answer_words(body: Iterable[str]) -> tuple[list[str], list[str]]:
    """The content words of the first sentence that affirms any, and those after it."""
    first: list[str] = []
    rest: list[str] = []
    ended = False
    for word in affirmed(body):
        ended = ended or (word == "." and bool(first))
        (rest if ended else first).extend(content_words([word]))
    return first, rest


def offers(body: Iterable[str], ways: Collection[str], nouns: Collection[str]) -> bool:
    """Whether a text says *feed the cat*, *borrow a bike*: a way, then a noun, with what a noun may have before it."""
    said = affirmed(body)
    for place, word in enumerate(said):
        if word in ways:
            following = (other for other in said[place + 1 :] if other not in _BEFORE_NOUNS)
            if next(following, "") in nouns:
                return True
    return False


def repetitions(words: Sequence[str]) -> int:
    """Number of word pairs said before, and of words said twice in a row; what begins with a mark is no pair."""
    pairs = list(pairwise(words))
    within = [pair for pair in pairs if pair[0] not in world.PUNCTUATION]
    return len(within) - len(set(within)) + sum(left == right for left, right in pairs)


def dangling(words: Sequence[str]) -> int:
    """Number of words left hanging: *and*, *the* or a comma before a full stop, *the is*, *very cat*."""
    return sum(_dangles(word, after) for word, after in pairwise((*words, ".")))


def _dangles(word: str, after: str) -> bool:
    if word in _OPEN and after in world.PUNCTUATION:
        return True
    if word in _ARTICLES:
        return after in _SILENT and after not in _AFTER_ARTICLES
    return word in _DEGREES and after not in _QUALITIES


def distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Levenshtein distance between two word sequences."""
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def without_politeness(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words outside polite phrases, and those phrases."""
    body: list[str] = []
    polite: list[str] = []
    position = 0
    while position < len(words):
        for phrase in _PHRASES.get(words[position], ()):
            if tuple(words[position : position + len(phrase)]) == phrase:
                position += len(phrase)
                polite.append(" ".join(phrase))
                break
        else:
            body.append(words[position])
            position += 1
    return body, polite
