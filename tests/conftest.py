"""Every test runs everywhere: on a GPU when there is one, in Triton's interpreter when not."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

# What a process has one of, how to read it, and how to set it: no test leaves it changed.
GLOBALS = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "current folder": (os.getcwd, os.chdir),
}

# One cache of compiled kernels for all processes: where none is named, torch.compile moves Triton's
# into a folder of its own, and what was compiled before is compiled once more.
os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache")
)
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, its own when it is imported: so before both.
    os.environ["TRITON_INTERPRET"] = "1"
import triton  # noqa: E402 (behind the variable that it reads)

if not torch.cuda.is_available():
    try:
        import strict_interpreter

        strict_interpreter.install()
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"the strict interpreter does not know Triton {triton.__version__}: {error}"
        ) from error

# The same examples on every run, so that a change alone can turn a test red: a few, because more
# would find on every run what they found on the first. More, and fresh ones:
# TRITIUM_EXAMPLES=10000 pytest.
EXAMPLES = os.environ.get("TRITIUM_EXAMPLES")
settings.register_profile(
    "tritium",
    max_examples=int(EXAMPLES or 40),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
)
# For tests.mutants, which asks whether an example fails, not for the smallest that does.
settings.register_profile(
    "mutants",
    settings.get_profile("tritium"),
    max_examples=int(EXAMPLES or 60),
    phases=[Phase.explicit, Phase.generate],
)
# For `pytest -m "not slow"`: a few of the examples.
settings.register_profile(
    "quick", settings.get_profile("tritium"), max_examples=int(EXAMPLES or 10)
)
settings.load_profile("tritium")


def pytest_configure(config):
    if config.option.markexpr == "not slow":
        settings.load_profile("quick")


# What `pytest -m "not slow"` leaves out, in addition to tests marked in their files: folders,
# files and tests that start processes, compile, or ran for two seconds or more.
SLOW = (
    "tests/bench/",
    "tests/data/test_encoding.py::test_killed_at_every_write",
    "tests/data/test_loader.py::test_fixed_batches_stop_at_what_there_is",
    "tests/data/test_prepared.py::test_installed_packages_are_a_source",
    "tests/data/test_tokenizer.py::test_a_megabyte_without_a_break",
    "tests/examples/",
    "tests/kernels/optimizers/test_adamw.py::test_clips_as_torch_does",
    "tests/kernels/optimizers/test_adamw.py::test_matches_torch",
    "tests/kernels/optimizers/test_muon.py",
    "tests/kernels/optimizers/test_optimizer_database.py",
    "tests/kernels/optimizers/test_optimizer_interface.py::test_flattened_state_resumes",
    "tests/kernels/optimizers/test_optimizer_interface.py::test_numbers_do_not_depend",
    "tests/kernels/optimizers/test_optimizer_properties.py",
    "tests/kernels/optimizers/test_optimizer_rules.py",
    "tests/kernels/optimizers/test_optimizer_shards.py",
    "tests/kernels/optimizers/test_precision_state.py::test_copies_continue_alike",
    "tests/kernels/optimizers/test_precision_steps.py::test_kernel_is_the_reference",
    "tests/kernels/test_cpu_backward.py::test_derivatives_are_exact",
    "tests/kernels/test_create_graph.py",
    "tests/kernels/test_cross_entropy.py::test_gradient_in_float64",
    "tests/kernels/test_cross_entropy.py::test_is_a_well_formed_operator",
    "tests/kernels/test_cross_entropy_group.py",
    "tests/kernels/test_cross_entropy_rows.py::test_extremes_count_on_edges_as_anywhere",
    "tests/kernels/test_embedding.py::test_a_token_that_occurs_a_thousand_times",
    "tests/kernels/test_embedding.py::test_gradient_in_float64",
    "tests/kernels/test_embedding.py::test_runs_across_borders",
    "tests/kernels/test_float64.py",
    "tests/kernels/test_info_nce.py::test_gradient_in_float64",
    "tests/kernels/test_launcher.py",
    "tests/kernels/test_layer_norm.py::test_every_combination_of_options",
    "tests/kernels/test_layer_norm.py::test_gradient_in_float64",
    "tests/kernels/test_layer_norm.py::test_wide_rows",
    "tests/kernels/test_linear_cross_entropy.py::test_gradient_in_float64",
    "tests/kernels/test_linear_cross_entropy.py::test_is_a_well_formed_operator",
    "tests/kernels/test_linear_cross_entropy.py::test_weight_gradient_is_summed_in_float32",
    "tests/kernels/test_linear_cross_entropy_memory.py::test_no_result_depends_on_the_number_of_chunks",
    "tests/kernels/test_linear_kl_div.py::test_gradient_in_float64",
    "tests/kernels/test_linear_log_prob.py::test_gradient_in_float64",
    "tests/kernels/test_linear_topk_kl_div.py::test_gradient_in_float64",
    "tests/kernels/test_loss_calls.py::test_one_compilation_serves_all_lengths",
    "tests/kernels/test_opinfo.py",
    "tests/kernels/test_qk_norm_rope.py::test_gradient_in_float64",
    "tests/kernels/test_qk_norm_rope.py::test_more_than_a_tile",
    "tests/kernels/test_qk_norm_rope.py::test_sums_over_more_programs_than_a_block",
    "tests/kernels/test_qk_norm_rope_calls.py::test_compiles_once_for_all_lengths",
    "tests/kernels/test_qk_norm_rope_calls.py::test_is_a_well_formed_operator",
    "tests/kernels/test_rms_norm.py::test_gradient_in_float64",
    "tests/kernels/test_rms_norm.py::test_is_a_well_formed_operator",
    "tests/kernels/test_rms_norm.py::test_more_rows_than_programs",
    "tests/kernels/test_rms_norm.py::test_wide_rows",
    "tests/kernels/test_softmax.py::test_hidden_keys_are_exact_and_never_read",
    "tests/kernels/test_softmax.py::test_is_a_well_formed_operator",
    "tests/kernels/test_softmax.py::test_lse_is_that_of_pytorch",
    "tests/kernels/test_transforms.py",
    "tests/model/test_activation_checkpointing.py",
    "tests/model/test_compile.py",
    "tests/model/test_families.py::test_every_family_compiles_in_one_graph_and_is_exported",
    "tests/model/test_reversible.py::test_compiles_in_one_graph",
    "tests/model/test_heads.py::test_compiles_in_one_graph",
    "tests/model/test_hf.py::test_compiles_in_one_graph",
    "tests/model/test_lora.py::test_compiles_in_one_graph",
    "tests/model/test_transforms.py",
    "tests/test_collection.py",
    "tests/test_mutants.py",
    "tests/test_packaging.py",
    "tests/test_strict_interpreter.py::test_a_grid_that_cuda_refuses_is_refused",
    "tests/test_words.py::test_words_are_those_of_the_field",
    "tests/train/",
    "tests/training/monitor/test_plot.py::test_no_title_keeps_a_picture_from_being_drawn",
    "tests/training/monitor/test_terminal.py::test_a_run_ends_well_wherever_it_prints",
    "tests/training/test_device.py::test_freed_memory_is_kept",
    "tests/training/test_self_check.py",
    "tests/training/test_waiting.py::test_a_team_makes_waiting_threads_sleep_and_its_end_lets_them_spin",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """`pytest -n auto`: a process for each core; on a GPU as many as its memory has room for."""
    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return min(cores, 8)
    from shared_gpu import processes_on_a_gpu

    return processes_on_a_gpu(cores, torch.cuda.get_device_properties(0).total_memory)


def pytest_terminal_summary(terminalreporter):
    if torch.cuda.is_available():
        return
    from strict_arithmetic import TRIED, VERSION

    if VERSION not in TRIED:
        terminalreporter.write_line(
            f"The strict interpreter was not tried on Triton {triton.__version__}: its private "
            "parts may have changed, and a failure may be the interpreter's."
        )


@pytest.fixture(autouse=True)
def leaks_nothing():
    """Put back what a test leaves changed in the process, and fail with its name."""
    before = {name: read() for name, (read, _) in GLOBALS.items()}
    environment = _environment()
    yield
    leaks = [name for name, (read, _) in GLOBALS.items() if read() != before[name]]
    for name in leaks:
        GLOBALS[name][1](before[name])
    after = _environment()
    changed = sorted(x for x in {*environment, *after} if environment.get(x) != after.get(x))
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: environment[name] for name in changed if name in environment})
    leaks += [f"environment variable {name}" for name in changed]
    assert not leaks, f"left changed by the test: {', '.join(leaks)}"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OTHERS}


# Set by pytest for every test, by torch.compile once, and by `data` where nobody has set it.
OTHERS = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TOKENIZERS_PARALLELISM",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def gpu_is_shared(leaks_nothing):
    """Hand the GPU's memory back after a test of large tensors: other processes have tests, too."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()


KEPT = 1 << 30  # bytes of the GPU that a process may keep from one test to the next


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(leaks_nothing):
    """Make `torch.empty` return NaN, so a kernel that leaves an element unwritten cannot pass."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
