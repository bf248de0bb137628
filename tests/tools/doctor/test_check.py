from tawin_nemo.tools.doctor.check import Check, Status, check, gib, lines, ok, summary, warning
from tawin_nemo.util.errors import ConfigError


def test_a_check_gets_its_name_and_keeps_what_it_found():
    @check("disk")
    def look(free: int) -> Check:
        return ok(f"{free} free")

    assert look(3) == Check("disk", Status.OK, "3 free", "")


def test_whatever_a_check_raises_becomes_a_failure_with_a_remedy():
    def raising(error: Exception) -> Check:
        @check("thing")
        def look() -> Check:
            raise error

        return look()

    own = raising(ConfigError("model.init=x is no folder; set it to random"))
    assert own == Check("thing", Status.FAILS, "cannot be used", "model.init=x is no folder; set it to random")
    lacking = raising(ModuleNotFoundError("No module named 'psutil'", name="psutil"))
    assert (lacking.status, lacking.value) == (Status.FAILS, "the package psutil is not installed")
    broken = raising(ZeroDivisionError("oops"))
    assert broken.status == Status.FAILS
    assert "ZeroDivisionError: oops" in broken.value
    assert broken.remedy


def test_the_table_has_a_line_per_check_and_one_per_remedy():
    found = [Check("CPUs", Status.OK, "2"), Check("shared memory", Status.WARNING, "64 MiB", "--shm-size=8g")]
    assert list(lines(found)) == [
        "ok        CPUs           2",
        "warning   shared memory  64 MiB",
        "                         -> --shm-size=8g",
    ]
    assert summary(found) == "1 ok, 1 warning"


def test_sizes_are_written_for_people():
    assert [gib(64 * 2**20), gib(2**30), gib(1.5 * 2**30)] == ["64 MiB", "1.0 GiB", "1.5 GiB"]
    assert warning("a", "b").remedy == "b"
