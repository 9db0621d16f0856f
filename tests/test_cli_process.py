"""The program as a process of its own: streams, files, threads and a reader that goes away."""

import json

from program import program


def test_no_progress_bar_where_standard_error_is_no_terminal(tmp_path):
    argv = ["sample", "--steps", 5, "--count", 2, "--output", tmp_path, "--json", "--no-pictures"]
    process = program("-m", "diffusion", *argv)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["images"] == 2


def test_a_program_that_has_loaded_torch_starts_again_with_its_wait_policy(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    script = tmp_path / "policy.py"
    script.write_text(
        "import os, sys\nprint(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "import diffusion.program.commands\nfrom diffusion.program.cli import main\n"
        "diffusion.program.commands.run_sample = lambda args: print(os.environ['OMP_WAIT_POLICY']) or sys.exit(5)\n"
        "sys.exit(main())\n"
    )
    process = program(script, "sample")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, "None\nPASSIVE\nPASSIVE\n")


def test_a_reader_that_goes_away_makes_no_noise(tmp_path):
    argv = ["sample", "--steps", 2, "--count", 1, "--output", tmp_path, "--no-pictures", "--threads", 1]
    process = program("-m", "diffusion", *argv)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_a_file_that_cannot_be_written_in_full_is_not_left_behind(tmp_path):
    # a limit on the size of files stands for a full disk: the write itself fails, whoever runs the test
    script = (
        "import resource, sys; from diffusion.program.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); "
        f"sys.exit(main(['sample', '--steps', '3', '--no-pictures', '--output', {str(tmp_path / 'out')!r}]))"
    )
    process = program("-c", script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == [f"deq-ddim: error: {tmp_path / 'out' / 'samples.safetensors'}: File too large"]
    assert not (tmp_path / "out").exists()
