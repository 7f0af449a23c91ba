"""Eight 64-bit words that are worked on together: a vector register where the CPU has one that wide, else several.

They are numbers to a kernel: `+ - & | ^ *` and shifts work word by word. A shift must be less than 64.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .intrinsics import BYTE, WORD, WORDS_8, declared, pointer, spread_word

LANE = ir.IntType(32)
LANES = ir.VectorType(LANE, 8)
FLAGS = ir.VectorType(ir.IntType(1), 8)


class EightWords(types.Type):
    def __init__(self) -> None:
        super().__init__("EightWords")


eight_words = EightWords()


@register_model(EightWords)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, WORDS_8)


def _operate(symbol, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, arguments, keywords):
            return signature(eight_words, *arguments) if arguments == (eight_words, eight_words) else None

    @lower_builtin(symbol, eight_words, eight_words)
    def generate(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments)


for _symbol, _instruction in {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
    operator.rshift: "lshr",
}.items():
    _operate(_symbol, _instruction)


def _constant(word: int) -> ir.Constant:
    return ir.Constant(WORDS_8, [word] * 8)


@intrinsic
def spread(typing_context, word):
    """The same word eight times."""

    def generate(context, builder, signature, arguments):
        return spread_word(builder, arguments[0])

    return eight_words(types.uint64), generate


@intrinsic
def load_eight(typing_context, address, offset):
    """The eight words at address + offset."""

    def generate(context, builder, signature, arguments):
        return builder.load(pointer(builder, *arguments, WORDS_8), align=1, typ=WORDS_8)

    return eight_words(types.int64, types.int64), generate


@intrinsic
def store_eight(typing_context, address, offset, words):
    """Write eight words at address + offset."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], pointer(builder, arguments[0], arguments[1], WORDS_8), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, eight_words), generate


@intrinsic
def gather(typing_context, address, offsets):
    """For each of eight offsets, the word at address + offset."""

    def generate(context, builder, signature, arguments):
        pointers = ir.VectorType(ir.PointerType(), 8)
        places = builder.inttoptr(builder.add(spread_word(builder, arguments[0]), arguments[1]), pointers)
        name = "llvm.masked.gather.v8i64.v8p0"
        function = declared(builder, name, WORDS_8, [pointers, LANE, FLAGS, WORDS_8])
        all_lanes = ir.Constant(FLAGS, [1] * 8)
        return builder.call(function, [places, LANE(1), all_lanes, ir.Constant(WORDS_8, ir.Undefined)])

    return eight_words(types.int64, eight_words), generate


@intrinsic
def preceding(typing_context, before, words):
    """The last of `before`, then the first seven of `words`."""

    def generate(context, builder, signature, arguments):
        return builder.shuffle_vector(*arguments, ir.Constant(LANES, list(range(7, 15))))

    return eight_words(eight_words, eight_words), generate


@intrinsic
def minimum(typing_context, left, right):
    """The smaller of each two words, which are not negative."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.icmp_unsigned("<", *arguments), *arguments)

    return eight_words(eight_words, eight_words), generate


@intrinsic
def nonzero_lanes(typing_context, words):
    """A mask of eight bits: which of the words are not 0."""

    def generate(context, builder, signature, arguments):
        found = builder.icmp_unsigned("!=", arguments[0], _constant(0))
        return builder.zext(builder.bitcast(found, BYTE), WORD)

    return types.uint64(eight_words), generate


@intrinsic
def smallest(typing_context, words):
    """The smallest of eight words, which are not negative."""

    def generate(context, builder, signature, arguments):
        name = "llvm.vector.reduce.umin.v8i64"
        return builder.call(declared(builder, name, WORD, [WORDS_8]), arguments)

    return types.int64(eight_words), generate


@intrinsic
def equal_lanes(typing_context, words, word):
    """A mask of eight bits: which of the words are equal to one word."""

    def generate(context, builder, signature, arguments):
        found = builder.icmp_unsigned("==", arguments[0], spread_word(builder, arguments[1]))
        return builder.zext(builder.bitcast(found, BYTE), WORD)

    return types.uint64(eight_words, types.uint64), generate
