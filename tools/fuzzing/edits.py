"""Edits of a valid document: some of its values, some of its bytes, so that most of it stays what it was.

An edit is three small numbers (which kind, where, with what), which hypothesis draws and shrinks. Edits of
values know the structure: they replace, drop, rename, repeat, exchange and nest what is there.
"""

import copy
import json

from hypothesis import strategies as st

from fuzzing.hostile import BYTES, KEYS, VALUES

MOST = 1 << 16


def _drop(container, key, value, number):
    del container[key]


def _replace(container, key, value, number):
    container[key] = copy.deepcopy(VALUES[number % len(VALUES)])


def _replace_keys(container, key, value, number):
    """A key becomes another; in a list, one more value stands before."""
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(VALUES[number % len(VALUES)]))
    else:
        container[KEYS[number % len(KEYS)]] = container.pop(key)


def _add(container, key, value, number):
    if isinstance(container, list):
        container.append(copy.deepcopy(value))
    else:
        container[KEYS[number % len(KEYS)]] = copy.deepcopy(VALUES[number // 7 % len(VALUES)])


def _wrap(container, key, value, number):
    container[key] = [value] if number % 2 else {"a": value}


def _unwrap(container, key, value, number):
    inner = list(value.values()) if isinstance(value, dict) else value
    container[key] = inner[number % len(inner)] if isinstance(inner, list) and inner else None


def _as_text(container, key, value, number):
    container[key] = json.dumps(value)


def _scale(container, key, value, number):
    number_like = isinstance(value, (int, float)) and not isinstance(value, bool)
    factors = (0, -1, 2, 0.5, 3, 10**6, 10**12)
    try:
        container[key] = value * factors[number % len(factors)] if number_like else None
    except OverflowError:  # the half of a number of thousands of digits
        container[key] = 0


OPERATIONS = (_replace, _replace, _replace, _drop, _drop, _replace_keys, _add, _wrap, _unwrap, _as_text,
              _scale, _scale)  # fmt: skip

edits_of_values = st.lists(
    st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, MOST), st.integers(0, MOST)),
    min_size=0, max_size=3,
)  # fmt: skip
edits_of_bytes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, MOST), st.integers(0, MOST)), max_size=2
)


def places(value):
    """Every container of a document with each of its keys, in order."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], (dict, list)):
                waiting.append(one[key])
    return found


def edited(document, edits):
    """A copy with the edits; a document that is no container any more stays what it became."""
    holder = [copy.deepcopy(document)]
    for kind, where, number in edits:
        known = places(holder)
        if not known:
            break
        # The first place is the document itself, which is replaced as seldom as any other.
        container, key = known[where % len(known)]
        OPERATIONS[kind](container, key, container[key], number)
    return holder[0] if holder else None


def edited_bytes(content, edits):
    """The bytes cut off, with something put in, without a slice, or with a slice twice."""
    for kind, where, number in edits:
        place = where % (len(content) + 1)
        end = place + number % 64
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + BYTES[number % len(BYTES)] + content[place:]
        elif kind == 2:
            content = content[:place] + content[end:]
        else:
            content = content[:end] + content[place:]
    return content
