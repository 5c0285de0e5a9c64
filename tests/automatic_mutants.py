"""Random changes of the numeric modules, and whether their tests notice: `make mutants`.

A change is one node of the syntax tree: an operator, a comparison, a number, a sign, a function for a related one or for nothing, two
arguments, a condition, what is returned. Of all that a module offers a sample is drawn. What nobody computes with is left alone:
docstrings and annotations, the making of messages (`raise`, `__str__`, `__repr__`, `extra_repr`) and bars of progress.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import random
from collections.abc import Iterator
from pathlib import Path

from mutation import PACKAGE, ROOT, Job, Outcome, run

# The files of each module, and the tests of each, likeliest first: whole files, or some of a file's (without "test_").
MODULES: dict[str, dict[str, dict[str, str]]] = {
    "schedules": {
        "schedules.py": {
            "learned_schedules": "derivatives_of_the_network log_density_is_a_density_and_its_gradient_is_at_fixed_log_snr "
            "a_fresh_schedule_is_nearly_log_linear monotone_with_the_ends_it_says steps_stay_apart_in_bfloat16 "
            "config_holds_the_start_and_the_state_dict_the_rest bad_arguments_are_refused respaced_chains_share_the_ends "
            "asked_from_another_device_it_answers_from_its_own",
            "continuous_time": "times_of_a_curve respacing_continuous_time drawn_times_have_their_law_and_weights "
            "fixed_schedules_of_betas_have_no_continuous_time the_whole_chain_is_refused_until_respaced "
            "times_outside_continuous_time_are_refused",
            "schedules": "",
        },
    },
    "distributions": {"distributions.py": {"distributions": ""}},
    "forward": {
        "forward.py": {
            "golden": "q_marginal q_posterior prior_bits",
            "kernels": "forward_laws_equal_a_loop event_dim_none_takes_all_dims_beyond_those_of_t posterior_at_1_is_refused "
            "scalar_and_lower_rank_timesteps_broadcast prior_follows_a_tensors_dtype",
            "misuse": "transitions_go_forward_in_time",
            "continuous_time": "the_standardised_step_is_the_one_documented both_kls_of_the_standardised_step transitions_between_times",
            "closed_forms": "transitions_compose_and_bayes_rule a_schedule_per_pixel_that_is_constant a_schedule_per_channel",
        },
    },
    "reverse": {
        "reverse.py": {
            "kernels": "",
            "golden": "the_models_law",
            "parity": "their_decoder_needs_bins_and_two_steps",
            "misuse": "respacing_to_one_step_has_no_openai_decoder data_off_the_grid_are_refused_by_the_ledger "
            "exchanging_the_network_reaches_every_part_and_the_rest_is_refused",
            "programs": "unknown_options_name_the_value network_of_another_output_shape_is_named",
            "sample": "respaced_chains",
            "flow": "denoising_between_the_steps",
            "closed_forms": "every_term_with_other_decoders a_schedule_per_pixel_that_is_constant",
            "continuous_time": "what_speaks_of_x_s_is_refused the_ledger_against_the_closed_form",
        },
    },
    "elbo": {
        "elbo.py": {
            "elbo": "",
            "closed_forms": "the_ledger_is_stock_pyros_loss one_timestep_loss_is_the_sum_of_its_sites "
            "bits_per_dim_is_the_only_change_of_unit",
            "programs": "strict_mean_field_refuses_the_forward_chain strict_mean_field_names_the_site "
            "strict_mean_field_accepts_what_is_right strict_renyi_takes_the_whole_chain_only "
            "trusted_programs_give_the_same_loss_for_less",
            "misuse": "the_strict_elbo_takes_normals_beside_gaussians a_users_normal_is_not_pyros "
            "weights_without_their_timesteps_are_refused lists_of_timesteps_and_stored_weights "
            "data_off_the_grid_are_refused_by_the_ledger shared_conditioning_is_not_cut_with_the_batch",
            "continuous_time": "the_ledger_against_the_closed_form given_weights_are_used",
        },
    },
    "sample": {
        "sample.py": {
            "closed_forms": "moments_of_ancestral_samples ddim_with_noise",
            "samplers": "",
            "reverse_chain": "the_same_numbers_as_sample log_probs_are_those_of_the_programs_sites "
            "the_density_of_a_step_is_that_of_its_noise the_backward_pass_is_in_evaluation_mode_too mistakes_are_named "
            "gradients_of_a_learned_decoder",
            "parity": "ddim_inversion",
            "sample": "",
        },
    },
    "likelihood": {
        "likelihood/flow.py": {
            "flow": "gaussian_data[eps-options1-1e-06] probes_enumerated probes_are_signs_of_their_own refusals conditioning_is_by_row "
            "one_step_of_the_chain_is_the_prior_alone order_of_convergence float32_and_what_it_cost "
            "a_graph_is_kept_only_where_it_is_wanted gradient_in_the_parameters",
        },
        "likelihood/dequantise.py": {
            "flow": "a_uniform_number_of_0_has_a_quantile one_sample_is_the_elbo "
            "importance_weights_integrate_to_the_probability refusals signed_gap "
            "probabilities_of_discrete_data_add_up_to_one bounds_by_probes_are_unbiased_for_one_sample",
            "log_likelihood": "evaluations_are_those_of_the_network a_seed_repeats_itself_and_leaves_the_generator_alone "
            "conditioning_goes_with_its_example the_table_is_the_same_whatever_the_method",
        },
        "likelihood/importance.py": {"importance": "", "log_likelihood": ""},
        "likelihood/information.py": {"information": "", "log_likelihood": ""},
        "likelihood/methods.py": {"log_likelihood": ""},
        "likelihood/estimate.py": {"log_likelihood": ""},
    },
}

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
SWAPS = {
    "sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "log": "log1p", "log1p": "log", "sigmoid": "tanh", "cosh": "sinh",
    "sinh": "cosh", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "floor": "ceil", "std": "var", "var": "std", "erfc": "erf",
}  # fmt: skip
REMOVED = {
    "sqrt", "square", "exp", "expm1", "log", "log1p", "sigmoid", "abs", "neg", "clamp", "detach", "flip", "cumsum", "mean", "round",
    "logit", "erfcx", "contiguous", "T",
}  # fmt: skip
SILENT = {"__str__", "__repr__", "extra_repr"}
PROGRESS = ("bar", "tqdm")


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that are computed with."""
    if isinstance(node, ast.Raise) or getattr(node, "name", None) in SILENT:
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in PROGRESS:
        return
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "type_params"):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, ast.AST))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""

    def changed(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield changed(op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]):
            yield from (changed(ops=[other()]) for other in COMPARISONS[type(op)])
        case ast.Constant(value=bool() as value):
            yield changed(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield from (changed(value=value + 1), changed(value=value - 1))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.BoolOp(op=op):
            yield changed(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=value) if value is not None:
            yield changed(value=ast.Constant(None))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            if name in SWAPS:
                yield changed(func=ast.Attribute(owner, SWAPS[name], ast.Load()))
            if name in REMOVED:
                of_a_module = isinstance(owner, ast.Name | ast.Attribute) and ast.unparse(owner) in (
                    "torch",
                    "math",
                    "torch.special",
                )
                yield node.args[0] if of_a_module else owner
        if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield changed(args=[node.args[1], node.args[0], *node.args[2:]])


def mutants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All changes of a tree: a part and what has taken its place, until the next is asked for."""
    for child in children(node):
        for new in changes(child):
            for field, value in ast.iter_fields(node):
                if value is child:
                    setattr(node, field, new)
                elif isinstance(value, list) and any(item is child for item in value):
                    setattr(node, field, [new if item is child else item for item in value])
                else:
                    continue
                yield child, new
                setattr(node, field, value)
        yield from mutants(child)


def node_ids(tests: dict[str, str]) -> list[str]:
    found: list[str] = []
    for file, names in tests.items():
        found += [f"tests/test_{file}.py::test_{name}" for name in names.split()] or [f"tests/test_{file}.py"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=[*MODULES], help=f"of {', '.join(MODULES)}; default: all")
    parser.add_argument("--count", type=int, default=50, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.csv")
    options = parser.parse_args()
    jobs, rows = [], []
    for module in options.modules:
        trees = {file: ast.parse((PACKAGE / file).read_text(encoding="utf-8")) for file in MODULES[module]}
        every = [(file, i) for file, tree in trees.items() for i, _ in enumerate(mutants(tree))]
        drawn = {*random.Random(f"{options.seed} {module}").sample(every, min(options.count, len(every)))}
        print(f"{module}: {len(drawn)} of {len(every)} mutants", flush=True)
        for file, tree in trees.items():
            tests = node_ids(MODULES[module][file])
            jobs.append(Job(tests, limit=900.0))
            rows.append((module, file, 0, "", ""))
            for i, (old, new) in enumerate(mutants(tree)):
                if (file, i) in drawn:
                    jobs.append(Job(tests, file, ast.unparse(ast.fix_missing_locations(tree)), limit=300.0))
                    rows.append((module, file, old.lineno, *(ast.unparse(node).split("\n")[0] for node in (old, new))))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["module", "file", "line", "old", "new", "verdict", "noticed by"])

        def tell(i: int, outcome: Outcome) -> None:
            table.writerow([*rows[i], outcome.verdict, outcome.test])
            file.flush()
            print(
                f"{outcome.verdict:8s} {outcome.seconds:5.1f} s  {rows[i][1]}:{rows[i][2]}  {rows[i][3]}  ->  {rows[i][4]}",
                flush=True,
            )

        outcomes = run(jobs, options.workers, tell)
    for module in options.modules:
        mine = [(row[2], outcome) for row, outcome in zip(rows, outcomes, strict=True) if row[0] == module]
        broken = [outcome for line, outcome in mine if not line and outcome.verdict != "survived"]
        if broken:
            raise SystemExit(f"{module}: the tests fail without a mutant: {broken[0]}")
        alive = sum(outcome.verdict not in ("killed", "broken", "timeout") for line, outcome in mine if line)
        total = sum(line > 0 for line, _ in mine)
        print(f"{module}: {total - alive} of {total} noticed, {alive} not")


if __name__ == "__main__":
    main()
