"""Small faults of the front end, of the CPU backend and of what ranks tell each other; and which tests find them.

``tests/support/mutation.py`` runs them.
"""

from __future__ import annotations

from mutation import Mutant, Tests

CLIPPING = Tests("tests/options/test_clipping.py", "not gpu")
MAX_GRAD_NORM = Tests("tests/options/test_max_grad_norm.py", "not gpu")
CONTRACT = Tests("tests/contract/test_contract.py")
TORCH = Tests("tests/contract/test_torch_contract.py")
SITUATIONS = Tests("tests/contract/test_situations.py")
AMP = Tests("tests/contract/test_amp.py")
REFUSALS = Tests("tests/contract/test_refusals.py")
FORMATS = Tests("tests/contract/test_checkpoint_formats.py")
MODES = Tests("tests/contract/test_modes.py")
COMPILE = Tests("tests/contract/test_compile.py")
MACHINE = Tests("tests/contract/test_state_machine.py", "one_process")
PROJECTION = Tests("tests/options/test_projection.py")
PRECISION = Tests("tests/options/test_precision.py")
REPORT = Tests("tests/options/test_report.py")
TABLE = Tests("tests/numerics/test_backends.py")
LIMITS = Tests("tests/numerics/test_limits.py")
RANGE = Tests("tests/numerics/test_range.py")
SHORT_ROWS = Tests("tests/numerics/test_short_rows.py")
COLUMNS = Tests("tests/numerics/test_columns.py")
ORACLE = Tests("tests/numerics/test_oracle.py")
RANKS = Tests("tests/sharding/test_sharding.py")
AGREEMENT = Tests("tests/sharding/test_sharding_contract.py")
SHARES = Tests("tests/sharding/test_shares.py")
HOSTS = Tests("tests/contract/test_host.py")

OPTIMIZER, GATHER, CLIP = "fused_adamp/optimizer.py", "fused_adamp/gather.py", "fused_adamp/clipping.py"
HOST, TABLES = "fused_adamp/host.py", "fused_adamp/backends/tables.py"
MEMORY, VALIDATE, OPTIONS = "fused_adamp/memory.py", "fused_adamp/validate.py", "fused_adamp/options.py"
CHECKPOINT, BUCKET, CPU = "fused_adamp/checkpoint.py", "fused_adamp/bucket.py", "fused_adamp/backends/cpu.py"
EXCHANGE, AGREE, STEP = (f"fused_adamp/sharded/{name}.py" for name in ("exchange", "agreement", "step"))
HEADER, DTENSOR, SLICE = (f"fused_adamp/sharded/{name}.py" for name in ("header", "dtensor", "flat_slice"))

FRONT_END = (
    Mutant(
        "a clip is used twice",
        OPTIMIZER,
        "        memory.clipping, memory.grad_norm = None, norm\n",
        "        memory.grad_norm = norm\n",
        (CLIPPING,),
    ),
    Mutant(
        "a step that failed leaves its clip",
        OPTIMIZER,
        "            memory.clipping = asked ",
        "            #",
        (MAX_GRAD_NORM,),
    ),
    Mutant(
        "the option clips after an explicit clip",
        OPTIMIZER,
        "        elif limit is not None and memory.clipping is None:\n",
        "        elif limit is not None:\n",
        (MAX_GRAD_NORM,),
    ),
    Mutant(
        "the option clips the scaled gradients",
        OPTIMIZER,
        "            unscaled = clipping.unscale_of(self) is not None\n",
        "            unscaled = False\n",
        (MAX_GRAD_NORM,),
    ),
    Mutant(
        "groups may name different limits",
        OPTIONS,
        "    if not all(_equal(first, other) for other in others):\n",
        "    if False:\n",
        (REFUSALS,),
    ),
    Mutant(
        "versions stay",
        OPTIMIZER,
        "            torch.autograd.graph.increment_version(present(batch.bucket.params, batch.grads))\n",
        "            assert present is not None\n",
        (CONTRACT, TORCH),
    ),
    Mutant(
        "a closure without gradients",
        OPTIMIZER,
        "            with torch.enable_grad():\n                loss = closure()",
        "            loss = closure()",
        (CONTRACT, TORCH),
    ),
    Mutant(
        "a refused group stays",
        OPTIMIZER,
        "            del self.param_groups[before:]\n",
        "",
        (REFUSALS, CONTRACT),
    ),
    Mutant("loading forgets a clip", OPTIMIZER, "        memory.clipping, memory.agreed = kept\n", "", (CLIPPING,)),
    Mutant(
        "loaded state is shared",
        OPTIMIZER,
        "    return empty_like(t, t.dtype).copy_(t)",
        "    return t",
        (CONTRACT, TORCH, SITUATIONS),
    ),
    Mutant(
        "a norm that is not finite is no error",
        OPTIMIZER,
        "if error_if_nonfinite and not (norm := clipped.norm_over(unscale)).isfinite():",
        "if error_if_nonfinite and norm.isnan():",
        (CLIPPING,),
    ),
    Mutant(
        "fused does not unscale",
        OPTIMIZER,
        'bool(defaults.get("fused") if wish is None else wish)',
        "bool(wish)",
        (AMP,),
    ),
    Mutant(
        "old groups lack options",
        OPTIMIZER,
        "                group.setdefault(name, default)\n",
        "                pass\n",
        (CONTRACT, TORCH),
    ),
    Mutant("a limit is read late", OPTIMIZER, "max_norm.clone() if", "max_norm if", (CLIPPING,)),
    Mutant(
        "the norm is not the caller's",
        CLIP,
        ".to(promoted([*dtypes]), copy=True)",
        ".to(promoted([*dtypes]))",
        (CLIPPING,),
    ),
    Mutant(
        "changed groups are not seen",
        GATHER,
        "        groups == memory.seen_groups\n",
        "        True\n",
        (PROJECTION, PRECISION),
    ),
    Mutant(
        "changed parameters are not seen",
        GATHER,
        "        and are_same(params, memory.seen_params)\n",
        "",
        (CONTRACT, MACHINE),
    ),
    Mutant(
        "parameters that begin to train are not seen",
        GATHER,
        "        and all(p.grad is None for p in memory.unbucketed)\n",
        "",
        (CONTRACT, SITUATIONS),
    ),
    Mutant(
        "marks are not seen", GATHER, "        and generation() == memory.seen_generation\n", "", (RANKS, AGREEMENT)
    ),
    Mutant(
        "moved weights are not seen",
        GATHER,
        "if memory.rounds is None or not are_same(weights, memory.seen_weights):",
        "if memory.rounds is None:",
        (SITUATIONS, MACHINE),
    ),
    Mutant(
        "overlaps end early",
        GATHER,
        "        reach = max(reach, end)\n",
        "        reach = end\n",
        (SITUATIONS, MACHINE),
    ),
    Mutant(
        "shared memory in any order",
        GATHER,
        "order = sorted({place for place, *_ in cluster})",
        "order = sorted({place for place, *_ in cluster}, reverse=True)",
        (SITUATIONS, MACHINE),
    ),
    Mutant(
        "a state_dtype is ignored",
        GATHER,
        "and wanted in (None, old.dtype):",
        "and wanted in (None, old.dtype, torch.float32):",
        (PRECISION,),
    ),
    Mutant(
        "a remainder that is out of date",
        GATHER,
        '            state[p].pop("remainder", None)\n',
        "            pass\n",
        (PRECISION,),
    ),
    Mutant(
        "old counts are not taken",
        GATHER,
        "        if not are_tensors(tensors[name]):",
        "        if False:",
        (CONTRACT, SITUATIONS, FORMATS),
    ),
    Mutant("lazy parameters are stepped", GATHER, " and not is_lazy(p)", "", (CONTRACT, SITUATIONS, TORCH)),
    Mutant("another seed in each run", GATHER, 'int(torch.randint(1 << 62, (), device="cpu"))', "id(p)", (PRECISION,)),
    Mutant(
        "a changed gradient is clipped as before",
        CLIP,
        "if batches and not clipping_holds(owner, batches):",
        "if batches and False:",
        (CLIPPING,),
    ),
    Mutant(
        "unscaled or clipped",
        CLIP,
        "factor.to(unscale.device, non_blocking=True) * unscale",
        "factor.to(unscale.device)",
        (AMP,),
    ),
    Mutant(
        "found_inf is ignored",
        CLIP,
        "            found_inf=on_device(found_inf, batch.bucket.key.device),\n",
        "            found_inf=None,\n",
        (AMP,),
    ),
    Mutant("the order 0 is scaled", MEMORY, " or self.norm_type == 0:", ":", (AMP, CLIPPING)),
    Mutant("small gradients grow", MEMORY, ".clamp(max=1.0)", "", (CLIPPING,)),
    Mutant("no 1e-6", MEMORY, "(limit / (norm + 1e-6))", "(limit / norm)", (CLIPPING,)),
    Mutant(
        "addresses are not compared",
        MEMORY,
        "            are_same(self.places, places)\n            and are_same(",
        "            are_same(",
        (CLIPPING, MACHINE),
    ),
    Mutant(
        "versions are not compared",
        MEMORY,
        "return [t._version for t in",
        "return [t._version * 0 for t in",
        (CLIPPING,),
    ),
    Mutant("tensors with gaps that overlap", VALIDATE, "    if overlaps(p):\n", "    if False:\n", (REFUSALS,)),
    Mutant("freed storage", VALIDATE, "    if not has_storage(t):\n", "    if False:\n", (REFUSALS, SITUATIONS)),
    Mutant(
        "a dimension twice", VALIDATE, "len({d % p.ndim for d in dims}) < len(dims) or ", "", (PROJECTION, REFUSALS)
    ),
    Mutant(
        "gradients of any dtype", VALIDATE, "    if g.dtype not in FLOATING:\n", "    if False:\n", (REFUSALS, CLIPPING)
    ),
    Mutant(
        "state of another shape",
        VALIDATE,
        "state[name].shape != p.shape:",
        "state[name].numel() < 0:",
        (REFUSALS, CONTRACT),
    ),
    Mutant(
        "a range is closed", OPTIONS, "(self.closed and value == self.high)", "value == self.high", (REFUSALS, CONTRACT)
    ),
    Mutant("True is a number", OPTIONS, "isinstance(value, bool) or not", "not", (REFUSALS, CONTRACT)),
    Mutant(
        "fused and foreach",
        OPTIONS,
        '    if group["fused"] and group["foreach"]:\n',
        "    if False:\n",
        (CONTRACT,),
    ),
    Mutant(
        "another rule's checkpoint",
        CHECKPOINT,
        "        if foreign:\n            _refuse_other_rules",
        "        if False:\n            _refuse_other_rules",
        (FORMATS,),
    ),
    Mutant(
        "another rule's state", CHECKPOINT, "    if foreign and (alien :=", "    if False and (alien :=", (FORMATS,)
    ),
    Mutant(
        "a machine's choice is loaded",
        CHECKPOINT,
        "if k not in _MACHINES and not (foreign",
        "if not (foreign",
        (FORMATS, CONTRACT),
    ),
    Mutant(
        "a missing moment is no error",
        CHECKPOINT,
        "    if missing := [key for key in needed if key not in state]:",
        "    if missing := []:",
        (FORMATS, REFUSALS, CONTRACT),
    ),
    Mutant("counts are shared", CHECKPOINT, ".reshape(()).clone()", ".reshape(())", (FORMATS,)),
    Mutant(
        "state that overlaps is used",
        BUCKET,
        " and t.layout is torch.strided and not overlaps(t)",
        " and t.layout is torch.strided",
        (SITUATIONS, CONTRACT, REFUSALS),
    ),
    Mutant(
        "another's decision",
        BUCKET,
        "        self.decisions[index] = UNDECIDED\n",
        "",
        (CONTRACT, PROJECTION, SITUATIONS, MODES),
    ),
    Mutant("gradients of another shape", BUCKET, "            and g.shape == p.shape\n", "", (REFUSALS, CLIPPING)),
    Mutant(
        "growth of the new norm",
        "fused_adamp/report.py",
        "growth = norm / before - 1",
        "growth = norm - before",
        (REPORT,),
    ),
    Mutant(
        "a compiled step drops gradients",
        "fused_adamp/torch_compile.py",
        "                p.grad = before[i]\n",
        "                pass\n",
        (COMPILE,),
    ),
    Mutant(
        "shared storage in a graph", "fused_adamp/tracing.py", "len(set(storages)) < len(storages) or ", "", (COMPILE,)
    ),
)

HOST_PASSES = (
    Mutant("another alignment is no change", HOST, "(a - b) % WIDEST_LOAD == 0 and ", "", (HOSTS,)),
    Mutant("a small storage is no change", HOST, " and has_storage(t)\n", "\n", (HOSTS,)),
    Mutant("a freed storage is known", HOST, "        return _unknown()\n    fits", "        pass\n    fits", (HOSTS,)),
    Mutant("strides are not compared", HOST, "list(map(Tensor.stride, tensors))", "[()]", (HOSTS,)),
    Mutant("dtypes are not compared", HOST, ", [t.dtype for t in tensors])", ")", (HOSTS,)),
    Mutant(
        "settled tensors are not the same ones",
        HOST,
        "settled and same and are_same([its() for its in layout.tensors], tensors)",
        "settled and same",
        (HOSTS,),
    ),
    Mutant(
        "an alignment of old in C++",
        "csrc/host.cpp",
        "(address - addresses[i]) % widest_load || ",
        "",
        (HOSTS,),
    ),
    Mutant("strides in C++", "csrc/host.cpp", " || words[1 + view.ndim + d] != view.strides[d]", "", (HOSTS,)),
    Mutant("any parameter's state in C++", "csrc/host.cpp", "if (key == p) return value;", "return value;", (HOSTS,)),
    Mutant("uploaded addresses are forgotten", TABLES, "        self.seen = self.seen | moved\n", "", (HOSTS,)),
    Mutant(
        "moved tensors stay where they were",
        TABLES,
        "        self.upload(self.addresses, self.places)\n        self.seen",
        "        self.seen",
        (HOSTS,),
    ),
    Mutant("replaced state is not seen", TABLES, "    if state:\n", "    if state and False:\n", (HOSTS,)),
)

CPU_BACKEND = (
    Mutant("hyperparameters of the first step", CPU, "if rows != scratch.rows:", "if not scratch.rows:", (CONTRACT,)),
    Mutant(
        "found_inf moves weights",
        CPU,
        "        operator = torch.ops.fused_adamp.first_stale\n",
        "        pass\n",
        (AMP,),
    ),
    Mutant(
        "views are listed",
        CPU,
        "    if not bucket.has_own_tensors:\n        return\n",
        "",
        (PROJECTION,),
        equivalent="views are other tensors in every step, so that a list of them never holds: it costs time alone",
    ),
    Mutant(
        "w without wd_ratio",
        "csrc/cpu_stages.cpp",
        "(decision == Decision::none ? 1 : x.scalars->wd_ratio)",
        "1",
        (TABLE,),
    ),
    Mutant(
        "a view's sums of one tile",
        "csrc/cpu_stages.cpp",
        "decision == Decision::layer ? tiles : x.table->segments();",
        "decision == Decision::layer ? 1 : x.table->segments();",
        (TABLE,),
    ),
    Mutant(
        "unmoved rows stay", "csrc/cpu_stages.cpp", "return sums.unmoved != 0 || ", "return ", (LIMITS, RANGE, TABLE)
    ),
    Mutant("a wrong guess stays", "csrc/cpu_stages.cpp", "if (!needs_finish(x, sums)) break;", "break;", (TABLE,)),
    Mutant(
        "the largest cosine is the last",
        "csrc/cpu_stages.cpp",
        "all.largest = std::max(all.largest, x.tiles[i].largest);",
        "all.largest = x.tiles[i].largest;",
        (TABLE,),
    ),
    Mutant(
        "update of a row for the layer",
        "csrc/cpu_stages.cpp",
        "rule.update_projected(data, scratch.u<T>(), 1, tile.size(), c, decay);",
        "rule.update_projected(data, scratch.u<T>(), tile.rows, tile.cols, c, decay);",
        (TABLE,),
    ),
    Mutant(
        "projected buffers are recovered",
        "csrc/cpu_plan.cpp",
        "keeps && x.rule != sgd_project_buffer && recoverable",
        "keeps && recoverable",
        (TABLE,),
    ),
    Mutant(
        "rounded weights are recovered",
        "csrc/cpu_plan.cpp",
        "(exact(role_p) || x.operand[role_remainder].data) && exact(role_m)",
        "exact(role_m)",
        (TABLE, PRECISION),
    ),
    Mutant(
        "all members count as one",
        "csrc/cpu_plan.cpp",
        "last->scalars == x.scalars && last->t == x.t",
        "last->scalars == x.scalars",
        (CONTRACT, SITUATIONS, TORCH),
    ),
    Mutant(
        "the same chance in each step",
        "csrc/cpu_plan.cpp",
        "step_key((*x.seed)++)",
        "step_key(*x.seed)",
        (PRECISION,),
    ),
    Mutant(
        "columns at any distance",
        "csrc/cpu_bind.cpp",
        "fits = layout.row_stride[r] == width && layout.inner[r][0] == layout.inner[role_p][0];",
        "fits = layout.row_stride[r] == width;",
        (COLUMNS,),
    ),
    Mutant(
        "columns of rounded state",
        "csrc/cpu_bind.cpp",
        "if (r == role_m || r == role_v) fits &=",
        "if (r == role_m) fits &=",
        (COLUMNS,),
    ),
    Mutant(
        "columns draw their numbers",
        "csrc/cpu_bind.cpp",
        "const bool follows = x.rule != sgd_project_buffer && !x.seed;",
        "const bool follows = x.rule != sgd_project_buffer;",
        (COLUMNS,),
    ),
    Mutant(
        "one job's sums of a row",
        "csrc/cpu_stages.cpp",
        "for (int64_t job = 0; job < jobs.per_row; ++job) sums.add(",
        "for (int64_t job = 0; job < 1; ++job) sums.add(",
        (COLUMNS,),
    ),
    Mutant(
        "the first rows' shrink for all",
        "csrc/cpu_stages.cpp",
        "reinterpret_cast<const T*>(x.shrink) + part.row);",
        "reinterpret_cast<const T*>(x.shrink));",
        (COLUMNS,),
    ),
    Mutant(
        "a turned gradient is read as it lies",
        "csrc/cpu_bind.cpp",
        "x.turned = !fits;",
        "x.turned = false;",
        (COLUMNS,),
    ),
    Mutant(
        "the first column's gradient for all",
        "csrc/cpu_kernels.h",
        "t.g_offset = col * (s.g_stride - s.stride);",
        "t.g_offset = col * -s.stride;",
        (COLUMNS,),
    ),
    Mutant(
        "no gradient for a move that needs it",
        "csrc/cpu_gather.h",
        "x.rule == adam_nesterov || x.rule == sgd_nesterov || x.rule == sgd_no_buffer;",
        "false;",
        (COLUMNS,),
    ),
    Mutant(
        "sums of short columns that left float32",
        "csrc/cpu_kernels.cpp",
        "const ViewSums right = right_sums<R>(t, s, first + row, 0, s.count, c, least, sums[row]);",
        "const ViewSums right = sums[row];",
        (COLUMNS,),
    ),
    Mutant(
        "a vector of rows is right if their weights are",
        "csrc/cpu_kernels.cpp",
        "all_less(s.gg, most) & all_less(absolute(s.pu), most) & all_less(low, smaller(s.pp, s.gg))",
        "all_less(low, s.pp)",
        (COLUMNS,),
    ),
    Mutant(
        "a permuted weight is flat beside any gradient",
        "csrc/cpu_bind.cpp",
        "same &= !t.exists || std::equal(p.strides, p.strides + p.dim, t.strides);",
        "same &= true;",
        (COLUMNS, PROJECTION),
    ),
    Mutant(
        "gaps are flat",
        "csrc/cpu_bind.cpp",
        "bool same = last == p.numel - 1;",
        "bool same = true;",
        (COLUMNS, PROJECTION),
    ),
    Mutant("another hash", "csrc/precision.h", "return z ^ z >> 31;", "return z ^ z >> 30;", (PRECISION,)),
    Mutant(
        "a gradient that lies otherwise",
        "csrc/cpu_bind.cpp",
        "x.gathered[r] = !dense;",
        "x.gathered[r] = !dense && r != role_g;",
        (TABLE,),
    ),
    Mutant(
        "an order by the gradient",
        "csrc/cpu_bind.cpp",
        "strides[role_p][a] > strides[role_p][b]",
        "strides[role_p][a] < strides[role_p][b]",
        (TABLE,),
        equivalent="the order within a row means nothing, as long as all tensors share it",
    ),
    Mutant(
        "a table of another shape",
        "csrc/cpu_bind.cpp",
        "row.rows == rows &&\n                row.rows * row.cols == p.numel;",
        "row.rows * row.cols == p.numel;",
        (CONTRACT, SITUATIONS, MACHINE),
    ),
    Mutant(
        "delta 0 is tested",
        "csrc/cpu_bind.cpp",
        "wish == Projection::automatic &&\n               x.scalars->delta > 0;",
        "wish == Projection::automatic;",
        (TABLE, PROJECTION, REPORT),
    ),
    Mutant(
        "blocks overlap",
        "csrc/cpu_gather.h",
        "(back ? outside : inside) = back ? inside : outside;",
        "(back ? outside : inside) = outside;",
        (TABLE,),
    ),
    Mutant(
        "|g| without its clamp",
        "csrc/algorithm.h",
        "const double gg = s.gg > test.eps2 ? s.gg : test.eps2;",
        "const double gg = s.gg;",
        (CLIPPING, LIMITS),
    ),
    Mutant(
        "|p| without eps",
        "csrc/algorithm.h",
        "const T norm = sqrt(pp) + eps;",
        "const T norm = sqrt(pp);",
        (LIMITS, ORACLE, TABLE),
    ),
    Mutant(
        "a NaN passes the test",
        "csrc/algorithm.h",
        "return ratio == ratio ? ratio : HUGE_VAL;",
        "return ratio == ratio ? ratio : 0;",
        (LIMITS, CLIPPING, PROJECTION),
    ),
    Mutant(
        "squares beyond double",
        "csrc/algorithm.h",
        "sizeof(T) == sizeof(double) && !ordinary(squares)) {\n    const double cosine",
        "false) {\n    const double cosine",
        (RANGE, LIMITS),
    ),
    Mutant(
        "nesterov's gain", "csrc/algorithm.h", "c.nesterov_gain * (c.scale * g)", "c.gain * (c.scale * g)", (TABLE,)
    ),
    Mutant(
        "a remainder of zero",
        "csrc/precision.h",
        "return ((magnitude(bits) == 0) & ((rest >> 31) != 0)) ? bits : bits + rest;",
        "return bits + rest;",
        (PRECISION,),
    ),
    Mutant(
        "ties the other way", "csrc/precision.h", "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000", (PRECISION,)
    ),
    Mutant(
        "float16 below its range",
        "csrc/storage.h",
        "if (size >= 0x47800000) return uint16_t(sign | 0x7c00);",
        "if (size >= 0x47800000) return uint16_t(sign | 0x7bff);",
        (LIMITS, PRECISION),
    ),
)

SHARDED = (
    Mutant(
        "ranks always agree",
        HEADER,
        "return all(self.ranks * square == total * total for",
        "return all(square >= 0 for",
        (AGREEMENT,),
    ),
    Mutant("a failure is not told", HEADER, "        if self.failed:\n", "        if False:\n", (AGREEMENT,)),
    Mutant("a failure tells nobody", AGREE, "            _withdraw(owner)\n", "            pass\n", (AGREEMENT,)),
    Mutant(
        "other parameters are not told",
        AGREE,
        "if memory.agreed is not None and memory.agreed.lines != exchange.lines:",
        "if False:",
        (AGREEMENT,),
    ),
    Mutant(
        "another clip is the same call",
        AGREE,
        '[*options_in_words(owner, exchange), "clip_grad_norm_"]',
        "options_in_words(owner, exchange)",
        (AGREEMENT,),
        equivalent="a step sends more lines, so that ranks still differ: the error only names the clip less clearly",
    ),
    Mutant(
        "a missing gradient is no zero",
        STEP,
        "    if missing := exchange.missing(outcome):",
        "    if missing := []:",
        (AGREEMENT, RANKS),
    ),
    Mutant(
        "a changed gradient on one rank",
        STEP,
        "stale=not (renewed or clipping_holds(owner, batches)),",
        "stale=False,",
        (AGREEMENT, RANKS),
    ),
    Mutant(
        "the test of other options",
        MEMORY,
        "if self.test_options == options and self.outcome is measured",
        "if self.outcome is measured",
        (RANKS, AGREEMENT),
    ),
    Mutant(
        "an old measurement",
        MEMORY,
        "if self.test_options == options and self.outcome is measured",
        "if self.test_options == options",
        (RANKS, AGREEMENT),
    ),
    Mutant(
        "ranks without gradients fail the test",
        EXCHANGE,
        "        records[:, 0].masked_fill_(here == 0, 0.0)\n",
        "",
        (RANKS, AGREEMENT),
    ),
    Mutant(
        "split rows never fail",
        EXCHANGE,
        "fails = (~passes.all(dim=1) & self._tested[members]).double()",
        "fails = 0 * pp.sum(dim=-1)",
        (RANKS,),
    ),
    Mutant(
        "the layer's projection of rows",
        EXCHANGE,
        "torch.where(decisions[owners] == Decision.CHANNEL, row_c, layer_c[owners])",
        "row_c",
        (RANKS,),
    ),
    Mutant("whole rows are added twice", EXCHANGE, ".index_fill(0, self._places, 0.0)", "", (RANKS, AGREEMENT)),
    Mutant(
        "the norm of some ranks",
        EXCHANGE,
        "if group in (*x.row_groups, *x.col_groups))",
        "if group in x.row_groups)",
        (RANKS, AGREEMENT),
    ),
    Mutant("rows and columns", DTENSOR, "placement.dim in row_dims", "placement.dim not in row_dims", (RANKS,)),
    Mutant(
        "numbers from 0 on each rank",
        DTENSOR,
        "first = sum(offset[d] * weight for d, weight in zip(order, weights, strict=True))",
        "first = 0",
        (RANKS,),
    ),
    Mutant(
        "rows before columns",
        "fused_adamp/sharded/layout.py",
        "ready = cols or rows",
        "ready = rows or cols",
        (AGREEMENT, RANKS),
    ),
    Mutant("a slice begins a row", SLICE, "head = min(-self.begin % cols, size)", "head = 0", (RANKS,)),
    Mutant(
        "a cut row of the first",
        SLICE,
        "first_split_row=self.cut_rows.index((self.begin + piece.begin) // cols) if is_cut else 0",
        "first_split_row=0",
        (RANKS,),
    ),
    Mutant("counts of pieces", BUCKET, "                further += [i] if p in uncounted else []\n", "", (RANKS,)),
    Mutant(
        "a share's limit is the largest",
        "csrc/cpu_stages.cpp",
        "all.least_limit = std::min(all.least_limit, x.tiles[i].least_limit);",
        "all.least_limit = x.tiles[i].least_limit;",
        (SHARES,),
    ),
    Mutant(
        "shares of unscaled gradients",
        "csrc/cpu_stages.cpp",
        "to.sums.sums.gg = scale * scale * all.total.sums.gg;",
        "to.sums.sums.gg = all.total.sums.gg;",
        (SHARES,),
    ),
    Mutant(
        "a step after a sweep",
        "csrc/cpu_plan.cpp",
        "if (x.swept && *x.swept != Swept::no) return Plan::finish;",
        "",
        (SHARES, RANKS),
    ),
)

MUTANTS = (*FRONT_END, *HOST_PASSES, *CPU_BACKEND, *SHARDED)
