from fastalign.cli.main import main


def test_a_limit_in_the_configuration_refuses_the_run_before_it_loads(large_run, capsys):
    assert main(["train", large_run, "memory_limit=6GB"]) == 2
    said = capsys.readouterr().err
    assert "memory_limit is 6GB, but the run is planned to need" in said
