"""Loops in machine code, and what goes once around them costs.

A loop is found as compilers do: from the flow between basic blocks, as all that can reach a backward branch without
passing its target again. Code that the compiler has moved out of the way belongs to it all the same, and loops nest.

The cost of a loop is that of the longest path once around it, so of two sides of a branch the dearer one counts, and what
no path ever has to enter does not: a `BRA.DIV` (taken where a warp has come apart before a shuffle) is no way to go, and
the caller may name inner loops that are `rare`, with whatever leads only to them.
"""
import collections
import re

CLASSES = {
    "mufu": r"MUFU",
    "fp32": r"FFMA|FMUL|FADD|FSEL|FSETP|FMNMX|FSET|FCHK",
    "fp16": r"HFMA2|HMUL2|HADD2|HSETP2|HMNMX2",
    "mma": r"[HIDQB]G?MMA",
    "shuffle": r"SHFL|VOTEU?|MATCH|C?REDUX",
    "shared": r"LDSM?|STSM?|ATOMS",
    "global": r"LDG|STG|LD|ST|LDGSTS|LDGDEPBAR|UBLKCP|CCTL",
    "atomic": r"ATOMG?|REDG?|REDAS",
    "local": r"LDL|STL",
    "convert": r"F2FP?|I2FP?|F2IP?|FRND",
    "control": r"BRA|BRX|JMP|EXIT|RET|CALL|BSSY|BSYNC|WARPSYNC|BREAK|NOP|YIELD|BPT|BMOV|NANOSLEEP",
    "barrier": r"BAR|MEMBAR|DEPBAR|SYNCS|FENCE|ERRBAR",
}

Instruction = collections.namedtuple("Instruction", "predicate opcode operands line")


def classify(opcode):
    root = opcode.split(".")[0]
    return next((name for name, pattern in CLASSES.items() if re.fullmatch(pattern, root)), "integer")


def parse(text):
    """The kernels in what `nvdisasm -c -g` prints: {name: [label or Instruction]}. Lines are (file, number)."""
    kernels, code, line = {}, None, None
    for row in text.splitlines():
        if match := re.match(r"//-+ \.text\.(\S+) +-", row):
            code = kernels.setdefault(match[1], [])
        elif row.startswith("//---"):
            code = None
        elif code is None:
            continue
        elif match := re.match(r'\s*//## File "([^"]*)", line (\d+)', row):
            line = (match[1], int(match[2]))
        elif match := re.match(r"(\.L_x_\w+):", row):
            code.append(match[1])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", row):
            code.append(Instruction(match[1], match[2], match[3], line))
    return kernels


class Block:
    def __init__(self):
        self.instructions, self.next = [], []

    def counts(self):
        return collections.Counter(classify(one.opcode) for one in self.instructions)


class Loop:
    def __init__(self, header, body):
        self.header, self.body = header, body
        self.instructions = [one for block in body for one in block.instructions]

    def count(self, pattern):
        return sum(bool(re.fullmatch(pattern, one.opcode)) for one in self.instructions)


def blocks(code):
    """The basic blocks, in order, linked by their `next`."""
    found, labels, ends = [Block()], {}, True
    for item in code:
        if isinstance(item, str):
            if found[-1].instructions:
                found.append(Block())
            labels[item] = found[-1]
            continue
        if ends and found[-1].instructions:
            found.append(Block())
        found[-1].instructions.append(item)
        ends = item.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX")
    for block, following in zip(found, found[1:] + [None]):
        last = block.instructions[-1] if block.instructions else None
        root = last.opcode.split(".")[0] if last else ""
        always = last and not last.predicate and not re.match(r"!?U?P\d", last.operands) and ".DIV" not in last.opcode
        if following and not (always and root in ("BRA", "EXIT", "RET", "BRX")):
            block.next.append(following)
        if root == "BRA" and ".DIV" not in last.opcode:
            target = re.search(r"\.L_x_\w+", last.operands)
            if target and labels[target[0]] not in block.next:
                block.next.append(labels[target[0]])
    return found


def loops(code):
    """All loops, those that hold others first."""
    order, found = blocks(code), {}
    place = {block: i for i, block in enumerate(order)}
    before = collections.defaultdict(list)
    for block in order:
        for after in block.next:
            before[after].append(block)
    dominators = dominance(order, before)
    for block in order:
        for header in block.next:
            if header not in dominators.get(block, ()):
                continue
            body, todo = {header}, [block]
            while todo:
                one = todo.pop()
                if one not in body:
                    body.add(one)
                    todo += before[one]
            found.setdefault(header, set()).update(body)
    made = [Loop(header, sorted(body, key=place.get)) for header, body in found.items()]
    return sorted(made, key=lambda loop: -len(loop.body))


def dominance(order, before):
    """For each block that can be reached from the first, those that every way to it passes."""
    reached, todo = set(), [order[0]]
    while todo:
        block = todo.pop()
        if block not in reached:
            reached.add(block)
            todo += block.next
    order = [block for block in order if block in reached]
    dominators = {block: reached for block in order}
    dominators[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            through = [dominators[one] for one in before[block] if one in reached]
            new = set.intersection(*through) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def inside(loop, found):
    """The loops directly within `loop`."""
    within = [one for one in found if one is not loop and one.header in loop.body and len(one.body) < len(loop.body)]
    return [one for one in within if not any(one.header in other.body for other in within if other is not one)]


def cost(loop, found, trips):
    """The instructions of each class once around `loop`. `trips` gives how often a loop within is gone around each time,
    or None where it is rare."""
    children = inside(loop, found)
    owner = {block: child for child in children for block in child.body}
    known = {}

    def scaled(counts, factor):
        return collections.Counter({name: count * factor for name, count in counts.items()})

    def from_here(block):
        unit = owner.get(block, block)
        if unit in known:
            return known[unit]
        if unit is block:
            own, ways = block.counts(), block.next
        else:
            times = trips(unit)
            if times is None:
                known[unit] = None
                return None
            own = scaled(cost(unit, found, trips), times)
            ways = [way for one in unit.body for way in one.next if way not in unit.body]
        rest = [collections.Counter() if way is loop.header else from_here(way) for way in ways
                if way is loop.header or way in loop.body]
        rest = [way for way in rest if way is not None]
        if not rest:
            known[unit] = None
        else:
            known[unit] = own + max(rest, key=lambda counts: sum(counts.values()))
        return known[unit]

    around = from_here(loop.header)
    if around is None:
        raise ValueError("no way around a loop but by rare ones")
    return around
