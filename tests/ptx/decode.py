"""Reads PTX and decodes one kernel of it for the machine of runtime.h.

Every modifier of an instruction has to be understood: one that is not raises :class:`UnknownInstructionError`, which
names the instruction. So nothing runs that would mean something else on a GPU.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["LANES", "Constant", "Instruction", "Module", "UnknownInstructionError", "Variable"]

LANES = 32
PREDICATE = 0
"""As a size: that of a register of predicates. Numbers have at least one byte."""

TYPES = {f"{kind}{bits}" for kind in "usb" for bits in (8, 16, 32, 64)}
TYPES |= {"b128", "f16", "bf16", "f32", "f64", "pred", "bf16x2", "f16x2"}
# Numbers of the machine: isa.h.
FLAGS = {"ftz": 1, "sat": 2, "wrap": 4, "shiftamt": 4, "NaN": 8, "integral": 16, "guard": 32, "source": 64, "relu": 128}
SPACES = {"global": 1, "shared": 2, "local": 3}
ORDERS = {"weak": 0, "volatile": 1, "relaxed": 1, "acquire": 2, "release": 3, "acq_rel": 4}
SCOPES = {"cta": 0, "gpu": 1, "sys": 1}
ROUNDS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}
TO_INTEGRAL = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
COMPARISONS_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
BOOLEANS = {"and": 1, "or": 2, "xor": 3}
UPDATES = ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]
SHUFFLES = ["idx", "up", "down", "bfly"]
VOTES = ["all", "any", "uni", "ballot"]

HINTS = re.compile(
    r"nc|ca|cg|cs|lu|cv|wb|wt|L[12]::(evict_(normal|unchanged|first|last|no_allocate)|no_allocate|\d+B)|uni|aligned"
)
"""Modifiers that change nothing that the machine models: caches, and promises that the machine does not need."""
WITHOUT_EFFECT = {"nanosleep", "prefetch", "prefetchu", "griddepcontrol", "pmevent"}

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_LABEL = re.compile(r"([\w$%.]+)\s*:(?!:)")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.(?:global|shared|local|const)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)*\.(shared|local|global|const)\s+(?:\.attribute\S*\s+)?(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?(?:\s*=\s*\{?([^};]*)\}?)?"
)
_DIRECTIVE = re.compile(r"\.(pragma|file|section|branchtargets)\b")


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of one, that the machine does not have."""


class Constant(NamedTuple):
    """A source that is no register: bits of a number, and the bytes of a lane that holds it, 4 or 8."""

    bits: int
    size: int


Operand = str | Constant | None
"""A register's name, a constant, or nothing (``_``)."""


@dataclass
class Instruction:
    """An instruction as isa.h describes it, before its registers have places."""

    text: str
    source: str
    """Where in the kernel's source it comes from, as the PTX says."""
    op: str = "nop"
    type: str = "b32"
    type2: str = "b32"
    operands: dict[int, Operand] = field(default_factory=dict)
    """By slot. Slot 0 is the target as a rule, slot 8 an address."""
    targets: tuple[int, ...] = (0,)
    """The slots that are written."""
    guard: str | None = None
    flags: int = 0
    space: int = 0
    order: int = 0
    scope: int = SCOPES["gpu"]
    round: int = 0
    variant: int = 0
    boolean: int = 0
    n: int = 1
    bytes: int = 4
    immediate: int = 0
    label: str | None = None
    target: int = 0


class Variable(NamedTuple):
    """A variable of a module in global or constant memory."""

    name: str
    buffer: ctypes.Array[ctypes.c_char]
    """Holds it, with room to align it."""
    address: int
    size: int
    """Bytes."""
    writable: bool


def size_of(type_: str) -> int:
    """Bytes of a number of a type."""
    return 4 if type_ in ("bf16x2", "f16x2") else int(re.sub(r"\D", "", type_)) // 8


def align(offset: int, size: int) -> int:
    """The next multiple of ``size``."""
    return -(-offset // size) * size


class Form(NamedTuple):
    """A form of an arithmetic instruction: what the machine calls it, its types, sources and further modifiers."""

    op: str
    types: str
    sources: int
    modifiers: str = ""


_I16, _I32, _I64 = "u16 s16 ", "u32 s32 ", "u64 s64 "
_INTEGERS = _I16 + _I32 + _I64
_REALS = "f32 f64"
_ROUNDED = "rn rz rm rp ftz sat"
_ADDITION = (
    Form("{}", "s32", 2, "sat"),
    Form("{}", _INTEGERS, 2),
    Form("{}", "f32", 2, _ROUNDED),
    Form("{}", "f64", 2, "rn rz rm rp"),
)
_EXTREME = (Form("{}", _INTEGERS, 2), Form("{}", "f32", 2, "ftz NaN"), Form("{}", "f64", 2))
_QUOTIENT = (Form("{}", "f32", 1, "rn rz rm rp ftz"), Form("{}", "f64", 1, "rn rz rm rp"))
_BITS = (Form("{}_", "b16 b32 b64 pred", 2),)
_APPROXIMATE = (Form("{}_approx", "f32", 1, "ftz"),)
_UPPER_WORD = (*_APPROXIMATE, Form("{}_approx", "f64", 1, "ftz"))
FORMS: dict[str, tuple[Form, ...]] = {
    "add": _ADDITION,
    "sub": _ADDITION,
    "mul.lo": (Form("mul", _INTEGERS, 2),),
    "mul.hi": (Form("mul_hi", _INTEGERS, 2),),
    "mul.wide": (Form("mul_wide", _I16 + _I32, 2),),
    "mul": (Form("mul", "f32", 2, _ROUNDED), Form("mul", "f64", 2, "rn rz rm rp")),
    "mad.lo": (Form("mad", _INTEGERS, 3),),
    "mad.hi": (Form("mad_hi", _INTEGERS, 3),),
    "mad.wide": (Form("mad_wide", _I16 + _I32, 3),),
    "mad": (Form("fma", "f32", 3, _ROUNDED), Form("fma", "f64", 3, "rn rz rm rp")),
    "fma": (Form("fma", "f32", 3, _ROUNDED), Form("fma", "f64", 3, "rn rz rm rp")),
    "div": (Form("div", _INTEGERS, 2), Form("div", "f32", 2, "rn rz rm rp ftz"), Form("div", "f64", 2, "rn rz rm rp")),
    "div.full": (Form("div_approx", "f32", 2, "ftz"),),
    "div.approx": (Form("div_approx", "f32", 2, "ftz"),),
    "rem": (Form("rem", _INTEGERS, 2),),
    "abs": (Form("abs", "s16 s32 s64 f64", 1), Form("abs", "f32", 1, "ftz")),
    "neg": (Form("neg", "s16 s32 s64 f64", 1), Form("neg", "f32", 1, "ftz")),
    "min": _EXTREME,
    "max": _EXTREME,
    "sqrt": _QUOTIENT,
    "rcp": _QUOTIENT,
    "sqrt.approx": _APPROXIMATE,
    "rcp.approx": _UPPER_WORD,
    "rsqrt.approx": _UPPER_WORD,
    "ex2.approx": _APPROXIMATE,
    "lg2.approx": _APPROXIMATE,
    "sin.approx": _APPROXIMATE,
    "cos.approx": _APPROXIMATE,
    "tanh.approx": (Form("tanh_approx", "f32", 1),),
    "copysign": (Form("copysign", _REALS, 2),),
    "and": _BITS,
    "or": _BITS,
    "xor": _BITS,
    "not": (Form("not_", "b16 b32 b64 pred", 1),),
    "cnot": (Form("cnot", "b16 b32 b64", 1),),
    "shl": (Form("shl", "b16 b32 b64", 2),),
    "shr": (Form("shr", _INTEGERS + "b16 b32 b64", 2),),
    "shf.l": (Form("shf_l", "b32", 3, "wrap clamp"),),
    "shf.r": (Form("shf_r", "b32", 3, "wrap clamp"),),
    "prmt": (Form("prmt", "b32", 3),),
    "lop3": (Form("lop3", "b32", 4),),
    "bfe": (Form("bfe", _I32 + _I64, 3),),
    "bfi": (Form("bfi", "b32 b64", 4),),
    "popc": (Form("popc", "b32 b64", 1),),
    "clz": (Form("clz", "b32 b64", 1),),
    "brev": (Form("brev", "b32 b64", 1),),
    "bfind": (Form("bfind", _I32 + _I64, 1, "shiftamt"),),
}
"""By name and mode."""
_FOUR_BYTE_SOURCES = {"shl": (2,), "shr": (2,), "bfe": (2, 3), "bfi": (3, 4)}
"""The slots of sources that have 32 bits whatever the type is."""
_COUNTS = ("popc", "clz", "bfind")


SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIALS += ["%laneid", "%warpid", *(f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge"))]
SPECIALS += ["%clock", "%clock64", "%globaltimer"]
"""In the order of isa.h, PTX_SPECIALS."""
_UPDATE_TYPES = {
    "add": "u32 s32 u64 f32 f64",
    **dict.fromkeys(("min", "max"), "u32 s32 u64 s64"),
    **dict.fromkeys(("and", "or", "xor", "exch"), "b32 b64"),
    "cas": "b16 b32 b64",
    **dict.fromkeys(("inc", "dec"), "u32"),
}
_DECODERS = {
    "mov": "_move",
    "cvt": "_convert",
    **dict.fromkeys(("setp", "set"), "_compare"),
    "selp": "_select",
    **dict.fromkeys(("cvta", "isspacep"), "_space"),
    "shfl": "_shuffle",
    **dict.fromkeys(("vote", "redux", "match", "elect"), "_lanes"),
    "activemask": "_active_lanes",
    **dict.fromkeys(("bar", "barrier"), "_barrier"),
    **dict.fromkeys(("fence", "membar"), "_fence"),
    "ldmatrix": "_load_matrix",
    **dict.fromkeys(("ld", "ldu", "st"), "_load_or_store"),
    **dict.fromkeys(("atom", "red"), "_atomic"),
}
"""The methods that decode what is not arithmetic."""


class Modifiers:
    """The modifiers of an instruction that have not been understood yet."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self.aligned = "aligned" in names
        self.left = [name for name in names if not HINTS.fullmatch(name)]
        self.types = [name for name in self.left if name in TYPES]
        self.left = [name for name in self.left if name not in TYPES]

    def take(self, name: str) -> bool:
        """Whether it is among them."""
        found = name in self.left
        if found:
            self.left.remove(name)
        return found

    def one_of(self, values: dict[str, int], default: int | None = None) -> int:
        """The value of the modifier that ``values`` knows."""
        for name in self.left:
            if name in values:
                self.left.remove(name)
                return values[name]
        if default is None:
            raise UnknownInstructionError(f"none of .{', .'.join(values)}")
        return default

    def index(self, names: Sequence[str]) -> int:
        """The index of the modifier that is in ``names``."""
        return self.one_of({name: i for i, name in enumerate(names)})

    def flags(self, *names: str) -> int:
        """The flags of those among them."""
        return sum(FLAGS[name] for name in names if self.take(name))


class Module:
    """An entry function of a PTX module, decoded.

    Args:
        ptx: the module's text.
        entry: the function's name; None for the first.

    Raises:
        ValueError: there is no such function, or it does not end.
        UnknownInstructionError: it holds an instruction that the machine does not have.
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        self.code: list[Instruction] = []
        self.registers: dict[str, int] = {}
        """Bytes of a lane by unique name: 4, 8, or 1 for a predicate."""
        self.labels: dict[str, int] = {}
        self.parameters: list[tuple[str, int, int]] = []
        """Type (``bytes`` for a structure), offset and size."""
        self.variables: list[Variable] = []
        self.block: tuple[int, ...] | None = None
        """Threads, where the module fixes or bounds them."""
        self.shared = self.local = 0
        """Bytes of a CTA and of a thread."""
        self._scopes: list[dict[str, str]] = []
        self._addresses: dict[str, tuple[str, int]] = {}
        self._parameter_offsets: dict[str, int] = {}
        match = next((m for m in _ENTRY.finditer(ptx) if entry in (None, m[1])), None)
        if match is None:
            raise ValueError(f"no entry function {entry or ''} in the module")
        self.name = match[1]
        end = ptx.index(")", match.end())
        self._declare_parameters(ptx[match.end() : end])
        begin = ptx.index("{", end)
        if threads := re.search(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", ptx[end:begin]):
            self.block = tuple(map(int, threads[1].split(",")))
        without_bodies = re.sub(r"\{[^{}]*;[^{}]*\}", "", ptx[: match.start()])
        for variable in _VARIABLE.finditer(without_bodies):
            self._declare_variable(variable)
        self._read_body(ptx, begin)
        for i in self.code:
            if i.label is not None:
                i.target = self.labels[i.label]

    # Declarations.

    def _declare_parameters(self, text: str) -> None:
        offset = 0
        for alignment, type_, name, count in _PARAMETER.findall(text):
            size = size_of(type_) * int(count or 1)
            offset = align(offset, max(int(alignment or 0), size_of(type_)))
            self._parameter_offsets[name] = offset
            self.parameters.append(("bytes" if count else type_, offset, size))
            offset += size

    def _declare_variable(self, match: re.Match[str]) -> None:
        space, alignment, type_, name, count, values = match.groups()
        width = size_of(type_)
        size = 0 if count == "" else width * int(count or 1)
        step = int(alignment or width)
        if space == "shared":
            self.shared = align(self.shared, step)
            self._addresses[name] = space, self.shared
            self.shared += size
        elif space == "local":
            self.local = align(self.local, step)
            self._addresses[name] = space, self.local
            self.local += size
        else:
            buffer = ctypes.create_string_buffer(size + 256)
            address = align(ctypes.addressof(buffer), 256)
            for i, value in enumerate(values.split(",") if values else []):
                bits = self._number(value.strip(), width)
                ctypes.memmove(address + i * width, bits.to_bytes(width, "little"), width)
            self.variables.append(Variable(name, buffer, address, size, space == "global"))
            self._addresses[name] = "global", address

    def _declare_registers(self, text: str) -> None:
        _, type_, names = text.split(None, 2)
        size = 1 if type_ == ".pred" else max(size_of(type_[1:]), 4)
        if size > 8:
            raise UnknownInstructionError(f"{text}: registers of 128 bits")
        for part in names.split(","):
            name, _, count = part.strip().partition("<")
            for one in [f"{name}{i}" for i in range(int(count.rstrip(">")))] if count else [name]:
                unique = one if len(self._scopes) == 1 else f"{one}@{len(self.registers)}"
                self._scopes[-1][one] = unique
                self.registers[unique] = size

    # Statements.

    def _read_body(self, ptx: str, begin: int) -> None:
        files = {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
        source = pending = ""
        for line in ptx[begin:].split("\n"):
            code, _, comment = line.partition("//")
            if code.split(None, 1)[:1] == [".loc"]:
                _, file, row, column, *_ = code.replace(",", " ").split()
                source = comment.strip() or f"{files.get(file, file)}:{row}:{column}"  # Triton's comments say more
                continue
            pending += " " + code
            while pending := pending.strip():
                if pending[0] == "{":
                    self._scopes.append({})
                    pending = pending[1:]
                elif pending[0] == "}":
                    self._scopes.pop()
                    pending = pending[1:]
                    if not self._scopes:
                        self.code.append(Instruction("the end of the function", source, "ret", targets=()))
                        return
                elif label := _LABEL.match(pending):
                    self.labels[label[1]] = len(self.code)
                    pending = pending[label.end() :]
                elif ";" in pending:
                    statement, _, pending = pending.partition(";")
                    self._read_statement(" ".join(statement.split()), source)
                else:
                    break
        raise ValueError(f"{self.name} does not end")

    def _read_statement(self, text: str, source: str) -> None:
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif variable := _VARIABLE.match(text):
            self._declare_variable(variable)
        elif text.startswith("."):
            if not _DIRECTIVE.match(text):
                raise UnknownInstructionError(f"{text}: an unknown directive")
        else:
            self._read_instruction(text, source)

    def _read_instruction(self, text: str, source: str) -> None:
        i = Instruction(text, source)
        rest = text
        if rest[0] == "@":
            guard, rest = rest[1:].split(None, 1)
            i.guard = self._register(guard.lstrip("!"))
            i.flags |= FLAGS["guard"] * guard.startswith("!")
        opcode, _, rest = rest.partition(" ")
        name, *names = opcode.split(".")
        operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest)] if rest.strip() else []
        modifiers = Modifiers(names)
        try:
            self._decode(i, name, modifiers, operands)
            if modifiers.left:
                raise UnknownInstructionError(f"the modifier .{modifiers.left[0]}")
        except (LookupError, ValueError, TypeError, NotImplementedError) as error:
            raise UnknownInstructionError(f"{text}: {error}") from error
        self.code.append(i)

    # Operands.

    def _register(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    @staticmethod
    def _number(text: str, size: int) -> int:
        """The bits of a literal."""
        if text[:2] in ("0f", "0F", "0d", "0D"):
            bits = int(text[2:], 16)
        elif re.fullmatch(r"-?\d+\.\d*([eE][+-]?\d+)?", text):
            bits = int.from_bytes(struct.pack("<f" if size == 4 else "<d", float(text)), "little")
        elif re.fullmatch(r"-?0[0-7]+U?", text):
            bits = int(text.rstrip("U"), 8)
        else:
            bits = int(text.rstrip("U"), 0)
        return bits & ((1 << 8 * size) - 1)

    def _operand(self, text: str, size: int, *, wider: bool = False) -> Operand:
        """A register, a literal, or an address, of ``size`` bytes or ``PREDICATE``.

        ``wider``: a register may be wider than the type, as that of a load, store or conversion may.
        """
        text = text.strip()
        if text == "_":
            return None
        lane = 1 if size == PREDICATE else max(size, 4)
        if register := self._register(text):
            given = self.registers[register]
            if given != lane and not (wider and given > lane > 1):
                raise UnknownInstructionError(f"{text} is a register of {given} bytes, not of {lane}")
            return register
        if size == PREDICATE:
            return Constant((1 << LANES) - 1 if int(text, 0) else 0, 4)  # the mask of all lanes
        if text in self._addresses:
            return Constant(self._addresses[text][1], lane)
        if text == "WARP_SZ":
            return Constant(LANES, lane)
        return Constant(self._number(text, size), lane)

    def _predicate(self, text: str) -> Operand:
        """A predicate among the operands; ``_`` for none."""
        return self._operand(text, PREDICATE)

    def _source_predicate(self, i: Instruction, text: str, slot: int) -> None:
        i.flags |= FLAGS["source"] * text.startswith("!")
        i.operands[slot] = self._predicate(text.lstrip("!"))

    def _vector(self, text: str, size: int) -> dict[int, Operand]:
        parts = text.strip("{} ").split(",")
        return {n: self._operand(part, size, wider=True) for n, part in enumerate(parts)}

    def _set_address(self, i: Instruction, text: str) -> None:
        """An address in brackets: a register or nothing in slot 8, and an immediate."""
        match = re.fullmatch(r"\[([^+\-\[\]]+)([+-].*)?\]", re.sub(r"\s+", "", text))
        if match is None:
            raise UnknownInstructionError(f"the address {text}")
        base, offset = match.groups()
        i.immediate = int((offset or "0").replace("+-", "-"), 0)
        if register := self._register(base):
            if self.registers[register] == 1:
                raise UnknownInstructionError(f"the address {text}")
            i.operands[8] = register
        elif base in self._addresses:
            i.immediate += self._addresses[base][1]
        else:
            i.immediate += int(base, 0)

    # Instructions.

    def _decode(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        if modifiers.types:
            i.type, i.type2 = modifiers.types[0], modifiers.types[-1]
        if f"{name}.{modifiers.left[0] if modifiers.left else ''}" in FORMS or name in FORMS:
            self._arithmetic(i, name, modifiers, operands)
        elif name in WITHOUT_EFFECT:
            i.op, i.targets, modifiers.left = "nop", (), []
        elif name in ("ret", "exit", "trap", "brkpt"):
            i.op, i.targets = {"exit": "ret", "brkpt": "trap"}.get(name, name), ()
            self._count(operands, 0)
        elif name == "bra":
            i.op, i.targets, i.label = "bra", (), operands[0]
            self._count(operands, 1)
        elif name in _DECODERS:
            getattr(self, _DECODERS[name])(i, name, modifiers, operands)
        else:
            raise UnknownInstructionError("the machine does not have it")

    @staticmethod
    def _count(operands: list[str], *counts: int) -> None:
        if len(operands) not in counts:
            raise UnknownInstructionError(f"{len(operands)} operands")

    @staticmethod
    def _types(i: Instruction, types: str) -> None:
        if i.type not in types.split():
            raise UnknownInstructionError(f"the type .{i.type}")

    def _arithmetic(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        mode = next((m for m in modifiers.left if f"{name}.{m}" in FORMS), None)
        if mode:
            modifiers.take(mode)
        forms = FORMS.get(f"{name}.{mode}" if mode else name, ())
        given = set(modifiers.left)
        form = next((f for f in forms if i.type in f.types.split() and given <= set(f.modifiers.split())), None)
        if form is None or len(modifiers.types) != 1:
            raise UnknownInstructionError(f"no such form for .{i.type}" + "".join(f" with .{m}" for m in sorted(given)))
        i.op = form.op.format(name)
        i.round = modifiers.one_of(ROUNDS, 0)
        i.flags |= modifiers.flags("ftz", "sat", "NaN", "wrap", "shiftamt")
        modifiers.take("clamp")
        self._count(operands, 1 + form.sources)
        if i.op == "lop3":
            i.immediate = self._number(operands.pop(), 4)
        size = PREDICATE if i.type == "pred" else size_of(i.type)
        wide = i.op.endswith("_wide")
        i.operands[0] = self._operand(operands[0], 4 if i.op in _COUNTS else 2 * size if wide else size)
        for slot, operand in enumerate(operands[1:], 1):
            four = slot in _FOUR_BYTE_SOURCES.get(i.op, ())
            i.operands[slot] = self._operand(operand, 4 if four else 2 * size if wide and slot == 3 else size)

    def _move(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._count(operands, 2)
        self._types(i, "pred u16 s16 b16 u32 s32 b32 u64 s64 b64 f32 f64")
        target, source = operands
        size = PREDICATE if i.type == "pred" else size_of(i.type)
        if source.startswith("%") and self._register(source) is None:
            i.op, i.immediate = "special", SPECIALS.index(source)
            i.operands = {0: self._operand(target, size)}
        elif source.startswith("{"):
            parts = source.strip("{} ").split(",")
            i.op, i.n = "pack", len(parts)
            i.operands = {0: self._operand(target, size)}
            i.operands |= {n: self._operand(part, size // i.n, wider=True) for n, part in enumerate(parts, 1)}
        elif target.startswith("{"):
            i.op, i.operands = "unpack", self._vector(target, size // len(target.split(",")))
            i.n = len(i.operands)
            i.targets = tuple(range(i.n))
            i.operands[8] = self._operand(source, size)
        else:
            i.op, i.operands = "mov", {0: self._operand(target, size), 1: self._operand(source, size)}
            if size < 8 and self._addresses.get(source, ("",))[0] in ("local", "global"):
                raise UnknownInstructionError(f"an address of {8 * size} bits")

    def _convert(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        pair = i.type in ("bf16x2", "f16x2")
        to, of = modifiers.types
        if of in ("pred", "b32", "bf16x2", "f16x2") or to in ("pred", "b32") or (pair and of != "f32"):
            raise UnknownInstructionError(f"a conversion of .{of} to .{to}")
        integral = modifiers.one_of(TO_INTEGRAL, -1)
        i.round = modifiers.one_of(ROUNDS, max(integral, 0))
        i.flags |= modifiers.flags("ftz", "sat", "relu")
        real = "f" in to and "f" in of
        if integral >= 0:
            i.flags |= FLAGS["integral"] * real
        i.op = "cvt_pair" if pair else "cvt"
        self._count(operands, 3 if pair else 2)
        i.operands = {0: self._operand(operands[0], size_of(to), wider=True)}
        i.operands |= {
            n: self._operand(operand, size_of(of), wider=not pair) for n, operand in enumerate(operands[1:], 1)
        }

    def _compare(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        i.op = name
        variant = modifiers.left.pop(0)
        i.variant = COMPARISONS.index(COMPARISONS_OF_UNSIGNED.get(variant, variant))
        i.boolean = modifiers.one_of(BOOLEANS, 0)
        i.flags |= modifiers.flags("ftz")
        if name == "set":
            i.type2, i.type = modifiers.types
            if i.type2 not in ("u32", "s32", "f32"):
                raise UnknownInstructionError(f"a result of type .{i.type2}")
            i.operands[0] = self._operand(operands[0], 4)
        else:
            first, _, second = operands[0].partition("|")
            i.operands[0] = self._predicate(first)
            if second:
                i.operands[4], i.targets = self._predicate(second), (0, 4)
        self._types(i, "b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64")
        self._count(operands, 4 if i.boolean else 3)
        for slot in (1, 2):
            i.operands[slot] = self._operand(operands[slot], size_of(i.type))
        if i.boolean:
            self._source_predicate(i, operands[3], 3)

    def _select(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._count(operands, 4)
        self._types(i, "b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64")
        i.op = "selp"
        i.operands = {n: self._operand(operand, size_of(i.type)) for n, operand in enumerate(operands[:3])}
        i.operands[3] = self._predicate(operands[3])

    def _space(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._count(operands, 2)
        i.op = "cvta_to" if modifiers.take("to") else name
        i.space = modifiers.one_of({**SPACES, "shared::cta": SPACES["shared"]})
        i.operands[0] = self._predicate(operands[0]) if name == "isspacep" else self._operand(operands[0], 8)
        i.operands[1] = self._operand(operands[1], 8)

    def _shuffle(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._synchronized(modifiers)
        self._types(i, "b32")
        self._count(operands, 5)
        i.op, i.variant, i.targets = name, modifiers.index(SHUFFLES), (0, 1)
        first, _, second = operands[0].partition("|")
        i.operands = {0: self._operand(first, 4), 1: self._predicate(second) if second else None}
        i.operands |= {n: self._operand(operand, 4) for n, operand in enumerate(operands[1:], 2)}

    @staticmethod
    def _synchronized(modifiers: Modifiers) -> None:
        if not modifiers.take("sync"):
            raise UnknownInstructionError("without .sync")

    def _lanes(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        """vote, redux, match and elect: something of the lanes that the last operand names."""
        self._synchronized(modifiers)
        self._count(operands, 2 if name == "elect" else 3)
        i.op = name
        i.operands[3] = self._operand(operands[-1], 4)
        if name == "elect":
            first, _, second = operands[0].partition("|")
            i.targets = (0, 1)
            i.operands |= {0: self._operand(first, 4), 1: self._predicate(second)}
        elif name == "vote":
            i.variant = modifiers.index(VOTES)
            i.operands[0] = self._operand(operands[0], 4 if i.variant == VOTES.index("ballot") else PREDICATE)
            self._source_predicate(i, operands[1], 2)
        else:
            if name == "match":
                i.op = "match_any"
                modifiers.one_of({"any": 0})
            else:
                i.variant = modifiers.index(UPDATES[:6])
            self._types(i, "b32" if name == "match" or i.variant >= UPDATES.index("and") else "u32 s32")
            i.operands |= {0: self._operand(operands[0], 4), 2: self._operand(operands[1], 4)}

    def _active_lanes(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._types(i, "b32")
        i.op, i.operands = name, {0: self._operand(operands[0], 4)}

    def _barrier(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        i.targets = ()
        modifiers.take("cta")
        self._synchronized(modifiers)
        if modifiers.take("warp"):
            self._count(operands, 1)
            i.op, i.operands = "bar_warp", {0: self._operand(operands[0], 4)}
            return
        self._count(operands, 1, 2)
        i.op, i.immediate, i.n = "bar", self._number(operands[0], 4), len(operands) - 1
        i.variant = int(name == "bar" or modifiers.aligned)
        i.target = self._number(operands[1], 4) if i.n else 0

    def _fence(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._count(operands, 0)
        modifiers.one_of({"sc": 0, "acq_rel": 0}, 0)
        of_cta = modifiers.one_of({"cta": 1, "gl": 0, "gpu": 0, "sys": 0})
        i.op, i.targets = "nop" if of_cta else "fence", ()

    def _load_matrix(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._synchronized(modifiers)
        self._types(i, "b16")
        self._count(operands, 2)
        modifiers.one_of({"m8n8": 0})
        modifiers.one_of({"shared": 0, "shared::cta": 0})
        i.op, i.bytes, i.space = name, 2, SPACES["shared"]
        i.n = modifiers.one_of({"x1": 1, "x2": 2, "x4": 4})
        i.variant = int(modifiers.take("trans"))
        i.operands = self._vector(operands[0], 4)
        i.targets = tuple(range(i.n))
        self._set_address(i, operands[1])

    def _access(self, i: Instruction, modifiers: Modifiers) -> None:
        """Decodes space, order, scope and size, which all instructions have that access memory."""
        i.space = modifiers.one_of({**SPACES, "shared::cta": SPACES["shared"], "const": SPACES["global"]}, 0)
        i.order = modifiers.one_of(ORDERS, i.order)
        i.scope = modifiers.one_of(SCOPES, i.scope)
        i.bytes = size_of(i.type)

    def _load_or_store(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        self._count(operands, 2)
        self._types(i, "b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64")
        vector, address = operands[::-1] if name == "st" else operands
        i.n = modifiers.one_of({"v2": 2, "v4": 4, "v8": 8}, 1)
        i.operands = self._vector(vector, size_of(i.type))
        if len(i.operands) != i.n:
            raise UnknownInstructionError(f"{len(i.operands)} elements of {i.n}")
        i.targets = () if name == "st" else tuple(range(i.n))
        if name != "st" and modifiers.take("param"):
            base, _, offset = address.strip("[] ").partition("+")
            i.op, i.bytes = "ld_param", size_of(i.type)
            i.immediate = self._parameter_offsets[base.strip()] + int(offset or "0", 0)
            return
        self._access(i, modifiers)
        i.op = "st" if name == "st" else "ld"
        self._set_address(i, address)

    def _atomic(self, i: Instruction, name: str, modifiers: Modifiers, operands: list[str]) -> None:
        i.op, i.order = "atom", ORDERS["relaxed"]
        self._access(i, modifiers)
        update = UPDATES[modifiers.index(UPDATES)]
        i.variant = UPDATES.index(update)
        self._types(i, _UPDATE_TYPES[update])
        target, *rest = ["_", *operands] if name == "red" else operands
        self._count(rest, 3 if update == "cas" else 2)
        i.operands = {0: self._operand(target, i.bytes)}
        i.operands |= {n: self._operand(operand, i.bytes) for n, operand in enumerate(rest[1:], 1)}
        self._set_address(i, rest[0])
