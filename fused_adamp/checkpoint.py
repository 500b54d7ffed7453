"""Optimizer state_dicts of other packages in this package's format, and back.

The state that each keeps per parameter, and the keys of its groups besides the hyperparameters that all share:

===================== ================================= ========================= ====================================
state_dict of         Adam family                       SGD family                groups
===================== ================================= ========================= ====================================
fused_adamp           ``step`` (0-dim float32 tensor),  ``momentum_buffer``; none backend, projection, ...
                      ``exp_avg``, ``exp_avg_sq``       for momentum=0
adamp 0.3 (clovaai)   the same, ``step`` an int         ``momentum``              nothing
timm 1.0.31           the same, ``step`` an int         ``momentum``              caution (nothing before 1.0.26)
pytorch_optimizer 4.1 ``exp_avg``, ``exp_avg_sq``       ``momentum``              step, weight_decouple, fixed_decay,
                                                                                  foreach; cautious, ... if asked for
torch.optim 2.13      ``step`` (tensor), ``exp_avg``,   ``momentum_buffer``; none amsgrad, decoupled_weight_decay,
                      ``exp_avg_sq``, with amsgrad also or None for momentum=0    maximize, fused, capturable, ...
                      ``max_exp_avg_sq``
===================== ================================= ========================= ====================================

Only this package keeps ``remainder`` (int16, the weight's shape) and ``rounding_seed`` (0-dim int64), if they are used.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check", "export", "to_ours"]

_ADAM = {"lr", "betas", "eps", "weight_decay"}
_SGD = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}
_PROJECTION = {"delta", "wd_ratio"}
_PROJECTED = _ADAM | _SGD | _PROJECTION
_SWITCHES = {"foreach", "fused", "capturable", "differentiable"}
_OURS = set(OPTIONS)
_MACHINES = {name for name, option in OPTIONS.items() if option.machine}
"""This package's hyperparameters. Other group keys, such as a scheduler's initial_lr, are passed on."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OTHER_RULES = {
    "amsgrad": (False, "divides by the largest exp_avg_sq so far"),
    "caution": (False, "masks updates that disagree with the gradient"),
    "cautious": (False, "masks updates that disagree with the gradient"),
    "adanorm": (False, "rescales gradients before they enter exp_avg"),
    "adam_debias": (False, "leaves the bias of exp_avg uncorrected"),
    "bias_correction": (True, "leaves the bias of both moments uncorrected"),
    "use_gc": (False, "centralises gradients"),
    "decoupled_weight_decay": (True, "adds weight decay to the gradient, and so to both moments"),
    "weight_decouple": (True, "adds weight decay to the gradient"),
    "fixed_decay": (False, "does not multiply weight decay by lr"),
    "corrected_weight_decay": (False, "multiplies weight decay by lr / max_lr once more"),
}
"""Others' options that change the rule: the value that makes it ours, and what the optimizer does at the other."""

_DECAY_RULES = {"decoupled_weight_decay", "weight_decouple", "fixed_decay", "corrected_weight_decay"}
_KOZISTR_UNUSED = {"step", "adanorm_r", "r", "ams_bound"}
_UNUSED = _OTHER_RULES.keys() | _SWITCHES | _KOZISTR_UNUSED
_UNUSED_STATE = {"max_exp_avg_sq", "exp_grad_adanorm", "exp_grad_norm"}

_OTHER_HYPERPARAMETERS = _words(
    """
    adam adaptive adjust_lr_fn adjusted_momentum algo alpha alpha_c always_adapt amplifier ams_bound
    apply_escape balance_param beta beta1 beta1_warmup beta2 beta2_cap beta2_decay beta3 betas_1d bf16_sr
    block_size buffer centered centralize clip clip_exp clip_grad_norm clip_grad_value clip_threshold
    clip_unmagnified_grad clipping_threshold compute_dtype constant constraint constraints conv_mode
    correct_bias curr_grad_norm curr_param_norm d d0 d_coef d_de_nom d_hat d_max d_numerator decay_offset
    decay_rate decouple_lr decoupled decoupled_decay decoupled_learning_rate decoupling_c degenerated_to_sgd
    derivative ema_rate eps1 eps2 eps_2 eps_root eps_scale etas extra_l2 fallback_lr_scale final_lr flatten
    flatten_end_dim flatten_start_dim g0_norm g_norm_min gamma grad_averaging grafting_beta grokfast
    grokfast_after_step grokfast_alpha grokfast_lamb growth_rate gsq_weighted hessian_power history_size init_lr
    initial_accumulator initial_accumulator_value integral inverse_root_method inverse_steps k kahan_sum kappa
    keep_num lambd lambda_1 lambda_2 lambda_abs lambda_rank lambda_rel leading_basis line_search_fn lips
    lora_l_dim lora_r_dim lr_1d lr_1d_factor lr_decay lr_in_momentum lr_max lr_power mars_type master_byte_width
    matrix_eps matrix_scaling max_dim max_eval max_grad_norm max_iter max_precondition_dim max_size_triangular
    memory_length memory_save_mode merge_dims min_beta1 min_dim_size_to_factor min_ndim_triangular
    momentum_decay momentum_dtype momentum_into_precond_update momentum_into_precondition_update
    moving_average_for_momentum mu_dtype newton_steps no_prox nonstandard_constant norm_kwargs norm_type
    normalize_gradient normalize_spatial ns_coefficients ns_coeffs ns_method ns_reset_steps ns_steps nu
    numerator_weighted nus optimize_1d p pa2 partial pbg2 pbhg2 phase power_iteration_steps
    power_iteration_vectors pre_conditioner_update_probability precond_dtype precond_init_scale precond_lr
    precondition_1d precondition_dtype precondition_frequency precondition_init_scale precondition_lr
    preconditioner_update_probability prev_grad_norm prev_param_norm progressive_iter projection_type
    qk_clip_alpha qk_clip_threshold quantize r rank ratio_min rebound rectify relative_epsilon relative_step rho
    safeguard_warmup safety_factor scale scale_eps scale_parameter scale_type schedule_decay shadow_weight
    shampoo_beta silent_sgd_phase sk_l1 sk_sq_weighted stabilize stable_weight_decay start_preconditioning_step
    step_sizes stochastic_weight_decay subset_size switch_rate t0 t_alpha_beta3 tau tau1 tau2 theta threshold
    tolerance_change tolerance_grad train_mode trust_clip trust_coeff trust_coefficient unscaled_wd
    update_capping update_counter update_interval update_proj_gap update_scale update_skipping use_adjusted_lr
    use_muon use_palm use_shadow v warmup_init warmup_steps wd_schedule weight_decay_1d weight_decay_type
    weight_lr_power weight_sum xi
    """
)
"""Group keys of the optimizers of torch.optim, pytorch_optimizer and timm that none of the formats here has.

Keys that schedulers and wrappers write too, such as max_lr, are left out: a rule is never known by these alone.
"""

_OTHER_STATE = _words(
    """
    acc_delta accumulator_0 accumulator_1 alpha_k approx_hessian avg_grad basis_l basis_r beta1_prod
    beta1_weight beta2_weight col_var d_buffer den_sum exp_avg exp_avg2 exp_avg_c exp_avg_diff exp_avg_grad
    exp_avg_lr exp_avg_lr_1 exp_avg_lr_2 exp_avg_r exp_avg_res_col exp_avg_res_row exp_avg_slow exp_avg_sq
    exp_avg_sq_col exp_avg_sq_row exp_avg_var exp_hessian_diag_sq exp_inf grad_avg grad_buffer grad_ma
    grad_queue grad_sum_sq grads_ema grok_exp_avg hessian hessian_moment i_buffer kahan_comp last_grad m_avg
    max_variance_ma momentum momentum_buffer mov_avg_grad mov_avg_param mu_product neg_exp_avg neg_grad_ma
    neg_momentum num_sum pos_momentum pre_conditioner precond previous_grad row_var second_momentum_buffer
    square_avg step_size trust_ratio v_avg variance_ma
    """
)
"""State keys of these optimizers that no format here has. Names that a wrapper may well choose are left out."""

_CHECKED = _OTHER_RULES.keys() | _SWITCHES | {"maximize", "step"}
"""Group keys of which the value decides, or which make no rule."""


class _Format(NamedTuple):
    """One optimizer's state_dict, as far as it differs from ours."""

    package: str
    name: str
    marks: set[str]  # group keys that tell it from the formats after it
    required: set[str]  # group keys that all its versions have
    keys: set[str]  # all group keys that it has in any version
    step: type  # how it counts: a Tensor or an int per parameter, or in the group, a dict
    buffer: str  # what it calls momentum_buffer
    shares: set[str]  # our hyperparameters that it has too
    own: dict[str, Any]  # its other group keys, at their defaults
    lacks: dict[str, Any]  # our hyperparameters that it acts as if it had at these values

    @property
    def adaptive(self) -> bool:
        return "betas" in self.marks


_NO_CLIPPING: dict[str, Any] = {"max_grad_norm": None}


def _pair(package: str, module: str, mark: str, step: type, own: dict[str, Any]) -> list[_Format]:
    """The AdamP and SGDP of a package."""
    # Without nesterov clovaai's update is the buffer: what projects the one projects the other.
    lacks = _NO_CLIPPING | {
        "maximize": False,
        "projection": "auto",
        "channel_dim": 0,
        "project_buffer": package == "clovaai",
    }
    rest = (step, "momentum", _PROJECTED, own, lacks)
    adam, sgd = _ADAM | _PROJECTION | {"nesterov"}, _SGD | _PROJECTION | {"eps"}
    keys = _PROJECTED | _CHECKED | own.keys() | (_KOZISTR_UNUSED if package == "pytorch_optimizer" else set())
    return [
        _Format(package, f"{module}.AdamP", {"betas", "delta", mark}, adam | {mark}, keys, *rest),
        _Format(package, f"{module}.SGDP", {"dampening", "delta", mark}, sgd | {mark}, keys, *rest),
    ]


_KOZISTR = {"weight_decouple": True, "fixed_decay": False, "foreach": False}
_TORCH = {"foreach": None, "fused": None, "differentiable": False}
_ADAMW = {**_TORCH, "amsgrad": False, "decoupled_weight_decay": True, "capturable": False}
_BUFFER, _MAX, _NO_NESTEROV = "momentum_buffer", {"maximize"}, {"nesterov": False}
_FORMATS = [
    _Format("fused_adamp", "fused_adamp.AdamP", {"betas", "backend"}, set(), _OURS, Tensor, _BUFFER, _OURS, {}, {}),
    _Format("fused_adamp", "fused_adamp.SGDP", {"dampening", "backend"}, set(), _OURS, Tensor, _BUFFER, _OURS, {}, {}),
    *_pair("pytorch_optimizer", "pytorch_optimizer", "fixed_decay", dict, _KOZISTR),
    *_pair("timm", "timm.optim", "caution", int, {"caution": False}),
    *_pair("clovaai", "adamp", "delta", int, {}),
    _Format(
        package="torch",
        name="torch.optim.Adam(W)",
        marks={"betas", "amsgrad"},
        required=_ADAM | {"amsgrad"},
        keys=_ADAM | _CHECKED,
        step=Tensor,
        buffer=_BUFFER,
        shares=_ADAM | _MAX,
        own=_ADAMW,
        lacks=_NO_CLIPPING | _NO_NESTEROV,
    ),
    _Format(
        package="torch",
        name="torch.optim.SGD",
        marks={"dampening"},
        required=_SGD,
        keys=_SGD | _SWITCHES | _MAX,  # no other rule's option, even at its default: SGDW is known by these alone
        step=Tensor,
        buffer=_BUFFER,
        shares=_SGD | _MAX,
        own=_TORCH,
        lacks=_NO_CLIPPING,
    ),
]

_OUR_STATE = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", "remainder", "rounding_seed"}
_COUNTERS = {"step", "rounding_seed"}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPES = {"step": (torch.float32,), "remainder": (torch.int16,), "rounding_seed": (torch.int64,)}


def to_ours(state_dict: dict[str, Any], *, adaptive: bool, options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Converts a state_dict of any of the formats above to this package's. Group keys tell the formats apart.

    Hyperparameters come from the state_dict, as in torch.optim. Those that it lacks come from ``options``: ``delta``
    for torch's, ``project_buffer`` for all others'. Options that depend on the machine stay as in ``options``:
    ``backend`` and ``amp_scaling``, and for other packages ``foreach``, ``fused``, ``capturable`` and
    ``differentiable`` too. An option that this package lacks, such as ``amsgrad``, is dropped if it is off. If it is on
    and changes the rule, it is an error. A group key that only optimizers of other rules have is an error at any value.
    Group keys of schedulers and users, and state that a wrapper such as Lookahead adds, are passed on unchanged.

    These are accepted, although the other optimizer would have continued differently:

    - torch.optim.SGD with weight decay. Ours is decoupled, ``lr * weight_decay / (1 - momentum)`` per step. Torch's
      adds up to the same over many steps (without dampening), so the coefficient keeps its meaning.
    - Adam and AdamW of a torch without the key ``decoupled_weight_decay``: from here on, decay is decoupled.
    - SGDP without nesterov of clovaai, and of timm before 1.0.26, which project the buffer: ``project_buffer`` decides.
    - pytorch_optimizer's AdamP, whose bias correction also divides eps, and whose nesterov differed before version 4.

    Args:
        state_dict: from an optimizer of any of these packages. It is not changed; the result shares its tensors.
        adaptive: True for AdamP, False for SGDP.
        options: the loading optimizer's own parameter groups, with or without "params".

    Raises:
        ValueError: an unknown format, an optimizer of the other family, another number of groups, or another rule.
    """
    fmt = _recognise(state_dict)
    loading = "AdamP" if adaptive else "SGDP"
    if fmt.adaptive != adaptive:
        other, allowed = ("SGDP", "AdamP, Adam or AdamW") if adaptive else ("AdamP", "SGDP or SGD")
        raise ValueError(
            f"the state_dict seems to come from {fmt.name}, which {loading} cannot continue: load it into {other}, or "
            f"load the state_dict of {allowed}"
        )
    foreign, groups = fmt.package != "fused_adamp", state_dict["param_groups"]
    _check_keys(fmt, groups, foreign=foreign)
    _check_count("the state_dict has", groups, "parameter groups", options)
    new_groups, state = [], dict(state_dict["state"])
    for number, (group, own) in enumerate(zip(groups, options, strict=True)):
        if foreign:
            _refuse_other_rules(fmt, group, number, loading)
        kept = {k: v for k, v in group.items() if k not in _MACHINES and not (foreign and k in _UNUSED)}
        new_groups.append({**own, **kept, "params": list(group["params"])})
        for i in group["params"]:
            given = state.pop(i, {})
            _check_entry(fmt, given, i, foreign=foreign)
            if entry := _state_to_ours(fmt, group, given):
                state[i] = entry
    return {**state_dict, "state": state, "param_groups": new_groups}


def check(state_dict: dict[str, Any], params: Sequence[Sequence[Tensor]], labels: Sequence[str]) -> None:
    """Raises ValueError unless a state_dict in this package's format fits the parameters. Waits for no device.

    A parameter without state fits: it has not been stepped yet. State under unknown keys always fits.

    Args:
        state_dict: in this package's format, as :func:`to_ours` returns it.
        params: the loading optimizer's parameters, group by group.
        labels: the parameters' names in messages, such as "parameter 'conv.weight'", in one flat list.
    """
    groups = state_dict["param_groups"]
    _check_count("the state_dict has", groups, "parameter groups", params)
    for number, (group, members) in enumerate(zip(groups, params, strict=True)):
        _check_count(f"group {number} of the state_dict has", group["params"], "parameters", members)
    places = [(group, i) for group in groups for i in group["params"]]
    for (group, i), p, label in zip(places, chain.from_iterable(params), labels, strict=True):
        if state := state_dict["state"].get(i):
            _check_state(state, p, label, group)


def export(state_dict: dict[str, Any], target: str) -> dict[str, Any]:
    """Converts a state_dict of this package to another package's format, to continue there with the same numbers.

    AdamP becomes the target's AdamP, or torch.optim.AdamW. SGDP becomes the target's SGDP, or torch.optim.SGD, where
    weight decay becomes an L2 penalty that adds up to the same over many steps. Torch's optimizers do not project, so
    the options of the projection are dropped for them. Always dropped are ``remainder`` (the low bits of bfloat16
    weights), ``rounding_seed``, and options that do not change the rule, such as ``state_dtype``. State that a wrapper
    has added is kept. pytorch_optimizer's AdamP differs in two ways: its bias correction also divides eps, and a
    parameter without state starts with its group's step count.

    Args:
        state_dict: from AdamP or SGDP of this package. It is not changed; the result shares its moments.
        target: "clovaai" (also for timm before 1.0.26), "timm", "pytorch_optimizer" or "torch".

    Raises:
        ValueError: the state_dict is not this package's, the target is unknown, its optimizer would silently ignore an
            option, or it counts steps per group and the counts within a group differ.
    """
    ours = _recognise(state_dict)
    if ours.package != "fused_adamp":
        raise ValueError(f"the state_dict seems to come from {ours.name}: pass one of fused_adamp, see to_ours")
    targets = {fmt.package: fmt for fmt in _FORMATS if fmt.adaptive == ours.adaptive and fmt is not ours}
    if target not in targets:
        raise ValueError(f"target={target!r} is unknown: choose one of {', '.join(map(repr, targets))}")
    fmt = targets[target]
    new_groups, state = [], dict[Any, dict[str, Any]]()
    for number, group in enumerate(state_dict["param_groups"]):
        _refuse_what_it_lacks(fmt, group, number)
        kept = {k: v for k, v in group.items() if k not in _OURS or k in fmt.shares}
        new_groups.append({**kept, **fmt.own, "params": list(group["params"])})
        entries = {i: entry for i in group["params"] if (entry := state_dict["state"].get(i))}
        steps = {i: int(entry["step"]) for i, entry in entries.items() if "step" in entry}
        if fmt.step is dict and steps:
            new_groups[-1]["step"] = _common_step(fmt, steps, number)
        for i, entry in entries.items():
            keys = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": fmt.buffer}
            new = {theirs: entry[key] for key, theirs in keys.items() if key in entry}
            if i in steps and fmt.step is not dict:
                new["step"] = (
                    torch.tensor(steps[i], dtype=torch.float32, device="cpu") if fmt.step is Tensor else steps[i]
                )
            if new:
                state[i] = {k: v for k, v in entry.items() if k not in _OUR_STATE} | new
    return {**state_dict, "state": state, "param_groups": new_groups}


def _recognise(state_dict: dict[str, Any]) -> _Format:
    if missing := sorted({"state", "param_groups"} - state_dict.keys()):
        raise ValueError(
            f"the state_dict has {sorted(map(str, state_dict))} and lacks {missing}: pass what an optimizer's "
            "state_dict() returned, not the checkpoint around it"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, dict) or not isinstance(groups, (list, tuple)):
        raise ValueError(
            f"the state_dict's state is a {type(state).__name__} and its param_groups are a {type(groups).__name__}, "
            "allowed are a dict and a list: pass what an optimizer's state_dict() returned"
        )
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            found = sorted(map(str, group)) if isinstance(group, dict) else f"a {type(group).__name__}"
            raise ValueError(
                f"group {number} of the state_dict is {found}, allowed is a dict with 'params': pass what an "
                "optimizer's state_dict() returned"
            )
    keys = set().union(*groups[:1])
    for fmt in _FORMATS:
        if fmt.marks <= keys:
            return fmt
    raise ValueError(
        f"the state_dict's groups have the keys {sorted(map(str, keys - {'params'}))}, which are not those of "
        f"{', '.join(fmt.name for fmt in _FORMATS)}: load the state_dict of one of these, or start without state"
    )


def _check_keys(fmt: _Format, groups: Sequence[dict[str, Any]], *, foreign: bool) -> None:
    """Raises ValueError unless each group has all keys of the format, and none that only another rule has."""
    # Ours never read a key that it does not have: its groups may hold any.
    others = (_OTHER_HYPERPARAMETERS | _PROJECTED | _OTHER_RULES.keys()) - fmt.keys if foreign else set()
    for number, group in enumerate(groups):
        if alien := sorted(others & group.keys()):
            listed = ", ".join(f"{key!r} (at {_in_words(group[key])})" for key in alien)
            raise ValueError(
                f"group key{'s' * (len(alien) > 1)} {listed} in group {number} of the state_dict: {fmt.name} has no "
                f"such hyperparameter, another rule has; allowed are {sorted(fmt.keys)} and keys of no optimizer. Load "
                "the state_dict of another optimizer, or delete what you have added to the group yourself"
            )
        if missing := sorted(fmt.required - group.keys()):
            raise ValueError(
                f"group {number} of the state_dict has the keys {sorted(map(str, group.keys() - {'params'}))} and "
                f"lacks {missing}, which {fmt.name} has in every group: load a whole state_dict of it, or start "
                "without state"
            )


def _check_entry(fmt: _Format, entry: Any, i: Any, *, foreign: bool) -> None:
    """Raises ValueError unless ``entry`` is a dict, without state of another rule. ``i`` is the parameter's index."""
    moments = {"exp_avg", "exp_avg_sq"} if fmt.adaptive else {fmt.buffer}
    if not isinstance(entry, dict):
        raise ValueError(
            f"the state of parameter {i} is a {type(entry).__name__}, allowed is a dict with {sorted(moments)}: load a "
            f"state_dict of {fmt.name}, or delete this entry from it to start the parameter afresh"
        )
    if foreign and (alien := sorted((_OTHER_STATE - moments) & entry.keys())):
        raise ValueError(
            f"the state of parameter {i} has {alien}, which {fmt.name} does not keep, but another rule; allowed are "
            f"{sorted(moments)} and keys of no optimizer: load a state_dict of {fmt.name}, or delete what you have "
            "added to the state yourself"
        )


def _in_words(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, tuple, type(None))) else f"a {type(value).__name__}"


def _refuse_other_rules(fmt: _Format, group: dict[str, Any], number: int, loading: str) -> None:
    _refuse_lone_dampening(fmt, group, number)
    for key, (value, does) in _OTHER_RULES.items():
        decay = key in _DECAY_RULES
        if group.get("weight_decay") or not decay:
            remedy = f"{' or weight_decay=0' if decay else ''} there to continue by {loading}'s rule"
            _require(group, number, key, value, f"{fmt.name} then {does}", remedy)


def _refuse_what_it_lacks(fmt: _Format, group: dict[str, Any], number: int) -> None:
    _refuse_lone_dampening(fmt, group, number)
    remedies = {
        "maximize": " there and negate the loss",
        "projection": ", and delta=0 for 'none', there",
        "max_grad_norm": " there and call torch.nn.utils.clip_grad_norm_ before each step",
    }
    for key, value in fmt.lacks.items():
        # The stored momentum's projection shows where there is a momentum, a projection, and no nesterov.
        if key != "project_buffer" or (group.get("momentum") and group["delta"] and not group["nesterov"]):
            why = f"{fmt.name} has no {key} and does what {key}={value!r} does"
            _require(group, number, key, value, why, remedies.get(key, " there to continue by its rule"))


def _refuse_lone_dampening(fmt: _Format, group: dict[str, Any], number: int) -> None:
    if fmt.name == "torch.optim.SGD" and not group["momentum"] and not group["nesterov"]:
        _require(
            group, number, "dampening", 0, "without momentum torch.optim.SGD ignores it and SGDP does not", " there"
        )


def _require(group: dict[str, Any], number: int, key: str, value: Any, why: str, remedy: str) -> None:
    if group.get(key, value) != value:
        raise ValueError(
            f"{key}={group[key]!r} in group {number} of the state_dict: {why}; set {key}={value!r}{remedy}"
        )


def _state_to_ours(fmt: _Format, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    new = dict(state)
    if fmt.package != "fused_adamp":
        new = {k: v for k, v in state.items() if k not in _UNUSED_STATE}
        buffer = new.pop(fmt.buffer, None)
        if buffer is not None and group["momentum"]:
            new["momentum_buffer"] = buffer
    if new and fmt.adaptive and ("step" in new or "step" in group):
        new["step"] = _step(new["step"] if "step" in new else group["step"])
    return new


def _step(count: Any) -> Any:
    """A new 0-dim float32 tensor from a number or a 1-element tensor; anything else unchanged, for :func:`check`."""
    if isinstance(count, (int, float)) or (isinstance(count, Tensor) and count.numel() == 1):
        device = count.device if isinstance(count, Tensor) else "cpu"
        return torch.as_tensor(count, dtype=torch.float32, device=device).reshape(()).clone()
    return count


def _common_step(fmt: _Format, steps: dict[Any, int], number: int) -> int:
    counts = sorted(set(steps.values()))
    if len(counts) > 1:
        listed = ", ".join(f"{n} of parameters {[i for i in steps if steps[i] == n]}" for n in counts)
        raise ValueError(
            f"steps differ within group {number} ({listed}), and {fmt.name} counts once per group: give parameters "
            "that have not been stepped together groups of their own"
        )
    return counts[0]


def _check_count(what: str, found: Sequence[Any], of: str, expected: Sequence[Any]) -> None:
    if len(found) != len(expected):
        raise ValueError(
            f"{what} {len(found)} {of}, the optimizer {len(expected)}: build the optimizer with the groups and "
            "parameters that it was saved with"
        )


def _check_state(state: dict[str, Any], p: Tensor, label: str, group: dict[str, Any]) -> None:
    remedy = "load a whole state_dict of this model, or delete this entry from it to start the parameter afresh"
    needed = ["step", "exp_avg", "exp_avg_sq"] if "betas" in group else []
    ours = [*(needed or ["momentum_buffer"]), "remainder", "rounding_seed"]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"the state of {label} has {list(state)} but lacks {missing}: {remedy}")
    for key in ours:
        if key not in state:
            continue
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"state {key!r} of {label} is a {type(value).__name__}, not a tensor: {remedy}")
        shape = () if key in _COUNTERS else tuple(p.shape)
        if tuple(value.shape) != shape and not (key in _COUNTERS and value.shape == (1,)):
            raise ValueError(
                f"state {key!r} of {label} has shape {tuple(value.shape)}, "
                f"{'the parameter' if shape else 'allowed is'} {shape}: {remedy}"
            )
        dtypes = _DTYPES.get(key, _FLOATING)
        if value.dtype not in dtypes:
            listed = ", ".join(map(str, dtypes))
            raise ValueError(f"state {key!r} of {label} has dtype {value.dtype}, allowed are {listed}: {remedy}")
