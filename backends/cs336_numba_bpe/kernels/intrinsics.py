"""The few machine operations that numba does not offer: unaligned loads, bit counting, prefetching, 64-byte masks.

Kernels take raw addresses for text, so that one load reads eight bytes wherever they begin. Every buffer is padded,
so that reading up to 128 bytes past its end stays inside the allocation.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import int64, njit, types, uint64
from numba.extending import intrinsic

BYTE, WORD = ir.IntType(8), ir.IntType(64)
BYTES_64 = ir.VectorType(BYTE, 64)
WORDS_8 = ir.VectorType(WORD, 8)

kernel = njit(_nrt=False, error_model="numpy", boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""A function that other kernels call, or an entry point. Without a runtime: kernels allocate nothing and raise
nothing."""
helper = njit(
    _nrt=False, error_model="numpy", boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True
)
"""A small function that always becomes part of its caller."""


@helper
def address_of(array):
    return int64(array.ctypes.data)


def pointer(builder, address, offset, type_):
    return builder.inttoptr(builder.add(address, offset), type_.as_pointer())


def declared(builder, name: str, result, arguments):
    """LLVM's function of that name, declared in this module if it is not yet."""
    function = builder.module.globals.get(name)
    return function or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def spread_word(builder, word):
    """A vector of eight times the same word."""
    nothing = ir.Constant(WORDS_8, ir.Undefined)
    first = builder.insert_element(nothing, word, ir.IntType(32)(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8))


def _splat(value: int):
    return ir.Constant(BYTES_64, [value] * 64)


@intrinsic
def load_word(typing_context, address, offset):
    """The eight bytes at address + offset, the first one lowest."""

    def generate(context, builder, signature, arguments):
        return builder.load(pointer(builder, *arguments, WORD), align=1, typ=WORD)

    return types.uint64(types.int64, types.int64), generate


@intrinsic
def load_byte(typing_context, address, offset):
    """The byte at address + offset as an int64."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.load(pointer(builder, *arguments, BYTE), align=1, typ=BYTE), WORD)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_word(typing_context, address, offset, value):
    """Write eight bytes at address + offset."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], pointer(builder, arguments[0], arguments[1], WORD), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), generate


def _store_narrow(bits: int):
    @intrinsic
    def store(typing_context, address, offset, value):
        """Write the low bits of a word at address + offset."""

        def generate(context, builder, signature, arguments):
            address, offset, value = arguments
            number = ir.IntType(bits)
            builder.store(builder.trunc(value, number), pointer(builder, address, offset, number), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.uint64), generate

    return store


store_uint16, store_uint32 = _store_narrow(16), _store_narrow(32)


@intrinsic
def lowest_bit(typing_context, mask):
    """The position of the lowest set bit of a mask, 64 where there is none."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def highest_bit(typing_context, mask):
    """The position of the highest set bit of a mask, -1 where there is none."""

    def generate(context, builder, signature, arguments):
        return builder.sub(ir.Constant(WORD, 63), builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0)))

    return types.int64(types.uint64), generate


@intrinsic
def number_of_bits(typing_context, mask):
    """How many bits of a mask are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def bit(typing_context, position):
    """A mask with one bit, 0 <= position < 64."""

    def generate(context, builder, signature, arguments):
        return builder.shl(ir.Constant(WORD, 1), arguments[0])

    return types.uint64(types.int64), generate


def prefetch_line(builder, address, offset, write: bool) -> None:
    place, integer, name = pointer(builder, address, offset, BYTE), ir.IntType(32), "llvm.prefetch.p0"
    function = declared(builder, name, ir.VoidType(), [place.type, integer, integer, integer])
    builder.call(function, [place, integer(int(write)), integer(3), integer(1)])


def _prefetch(write: bool):
    @intrinsic
    def ask(typing_context, address, offset):
        """Ask for the cache line at address + offset."""

        def generate(context, builder, signature, arguments):
            prefetch_line(builder, *arguments, write)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return ask


prefetch_to_read, prefetch_to_write = _prefetch(False), _prefetch(True)


@intrinsic
def not_inlined(typing_context):
    """Keep the function that calls this apart from its callers: their values would take up the registers that its
    loops need."""

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def select(typing_context, condition, chosen, otherwise):
    """`chosen` where the condition holds, else `otherwise`, without a branch that could be mispredicted."""

    def generate(context, builder, signature, arguments):
        selected = builder.select(*arguments)
        selected.set_metadata("unpredictable", builder.module.add_metadata([]))
        return selected

    return types.int64(types.boolean, types.int64, types.int64), generate


@intrinsic
def byte_masks(typing_context, address, offset):
    """Seven 64-bit masks of the 64 bytes at address + offset, bit 0 for the first byte:
    ASCII letters, digits, white space, spaces, apostrophes, all non-ASCII bytes, lead bytes of non-ASCII characters."""
    result = types.UniTuple(types.uint64, 7)

    def generate(context, builder, signature, arguments):
        text = builder.load(pointer(builder, *arguments, BYTES_64), align=1, typ=BYTES_64)

        def mask(comparison):
            return builder.bitcast(comparison, WORD)

        lower = builder.or_(text, _splat(0x20))
        letters = mask(builder.icmp_unsigned("<", builder.sub(lower, _splat(ord("a"))), _splat(26)))
        digits = mask(builder.icmp_unsigned("<", builder.sub(text, _splat(ord("0"))), _splat(10)))
        is_space = builder.icmp_unsigned("==", text, _splat(0x20))
        is_control_space = builder.icmp_unsigned("<", builder.sub(text, _splat(0x09)), _splat(5))
        white = mask(builder.or_(is_space, is_control_space))
        apostrophes = mask(builder.icmp_unsigned("==", text, _splat(ord("'"))))
        high = mask(builder.icmp_unsigned(">=", text, _splat(0x80)))
        leads = mask(builder.icmp_unsigned(">=", text, _splat(0xC0)))
        masks = [letters, digits, white, mask(is_space), apostrophes, high, leads]
        return context.make_tuple(builder, result, masks)

    return result(types.int64, types.int64), generate


@intrinsic
def line_end_mask(typing_context, address, offset):
    """The mask of newlines and carriage returns among the 64 bytes at address + offset."""

    def generate(context, builder, signature, arguments):
        text = builder.load(pointer(builder, *arguments, BYTES_64), align=1, typ=BYTES_64)
        matches = [builder.icmp_unsigned("==", text, _splat(ord(character))) for character in "\n\r"]
        return builder.bitcast(builder.or_(*matches), WORD)

    return types.uint64(types.int64, types.int64), generate


@intrinsic
def two_byte_mask(typing_context, address, offset, first, second):
    """The mask of places among 64 where byte `first` is followed by byte `second` (any byte where second is
    negative)."""

    def generate(context, builder, signature, arguments):
        address, offset, first, second = arguments
        here = builder.load(pointer(builder, address, offset, BYTES_64), align=1, typ=BYTES_64)
        after = builder.add(offset, ir.Constant(WORD, 1))
        following = builder.load(pointer(builder, address, after, BYTES_64), align=1, typ=BYTES_64)

        def broadcast(value):
            undefined = ir.Constant(BYTES_64, ir.Undefined)
            one = builder.insert_element(undefined, builder.trunc(value, BYTE), ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
            return builder.shuffle_vector(one, undefined, lanes)

        first_matches = builder.bitcast(builder.icmp_unsigned("==", here, broadcast(first)), WORD)
        second_matches = builder.bitcast(builder.icmp_unsigned("==", following, broadcast(second)), WORD)
        any_second = builder.ashr(second, ir.Constant(WORD, 63))
        return builder.and_(first_matches, builder.or_(second_matches, any_second))

    return types.uint64(types.int64, types.int64, types.int64, types.int64), generate


CAN_COMPRESS = bool(llvm.get_host_cpu_features().get("avx512vbmi2"))
"""Whether this CPU moves the bytes under a mask together in one instruction."""


@intrinsic
def _store_compressed(typing_context, address, base, mask):
    def generate(context, builder, signature, arguments):
        address, base, mask = arguments
        lanes, integer = ir.VectorType(ir.IntType(1), 64), ir.IntType(32)
        name = "llvm.experimental.vector.compress.v64i8"
        compress = declared(builder, name, BYTES_64, [BYTES_64, lanes, BYTES_64])
        every = ir.Constant(BYTES_64, list(range(64)))
        positions = builder.call(compress, [every, builder.bitcast(mask, lanes), ir.Constant(BYTES_64, ir.Undefined)])
        count = builder.ctpop(mask)
        bases = spread_word(builder, base)

        def store(group):
            chosen = ir.Constant(ir.VectorType(integer, 8), list(range(8 * group, 8 * group + 8)))
            eight = builder.shuffle_vector(positions, ir.Constant(BYTES_64, ir.Undefined), chosen)
            place = pointer(builder, address, ir.Constant(WORD, 64 * group), WORDS_8)
            builder.store(builder.add(builder.zext(eight, WORDS_8), bases), place, align=1)

        for group in range(3):
            store(group)
        with builder.if_then(builder.icmp_unsigned(">", count, ir.Constant(WORD, 24)), likely=False):
            for group in range(3, 8):
                store(group)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), generate


@helper
def store_set_bits(address, base, mask):
    """Write base + the position of each set bit of a mask, one word each from `address` on, and up to 63 words that
    mean nothing behind them."""
    if CAN_COMPRESS:
        _store_compressed(address, base, mask)
    else:
        # Eight at a time, whatever there are: a loop that ended with the last one would be mispredicted every time.
        while mask != uint64(0):
            for eighth in range(8):
                store_word(address, 8 * eighth, uint64(base + lowest_bit(mask)))
                mask &= mask - uint64(1)
            address += 64
