"""Power and temperature, from trees of real files that look like /sys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penguin_edge.runtime.bench import power
from penguin_edge.runtime.bench.power import Meter

NOTHING = {
    "power_w": None,
    "energy_j": None,
    "temperature_c": None,
    "sensors": {"power": None, "temperature": None},
}


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


def rapl(number: str, name: str, energy: int, highest: int = 1_000_000_000) -> dict[str, Any]:
    folder = f"class/powercap/intel-rapl:{number}"
    return {f"{folder}/name": name, f"{folder}/energy_uj": energy, f"{folder}/max_energy_range_uj": highest}


def rail(number: int, label: str, millivolts: int, milliamperes: int) -> dict[str, Any]:
    base = "class/hwmon/hwmon3"
    return {
        f"{base}/name": "ina3221",
        f"{base}/in{number}_label": label,
        f"{base}/in{number}_input": millivolts,
        f"{base}/curr{number}_input": milliamperes,
    }


def test_a_machine_without_sensors_tells_nothing(tmp_path: Path) -> None:
    for root in (tmp_path / "gone", write(tmp_path, {"class/hwmon/hwmon0/name": "nothing"})):
        with Meter(root) as meter:
            pass
        assert meter.to_json() == NOTHING and meter.power == meter.celsius == []


def test_energy_counters_are_added_and_wrap(tmp_path: Path) -> None:
    files = rapl("0", "package-0", 900_000_000) | rapl("1", "package-1", 0)
    # A part of a package, and the platform around both, would count it twice.
    root = write(tmp_path, files | rapl("0:0", "core", 5) | rapl("2", "psys", 5))
    meter = Meter(root)
    meter.sample(0.0)
    write(root, rapl("0", "package-0", 920_000_000) | rapl("1", "package-1", 4_000_000))
    meter.sample(2.0)
    write(root, rapl("0", "package-0", 10_000_000) | rapl("1", "package-1", 5_000_000))
    meter.sample(3.0)
    assert meter.power == [(2.0, 12.0), (3.0, 91.0)]
    found = meter.to_json()
    assert found["energy_j"] == 115.0 and found["power_w"] == {"mean": pytest.approx(115 / 3), "max": 91.0}
    assert found["sensors"]["power"] == "rapl: package-0, package-1" and found["temperature_c"] is None


def test_a_wrap_of_unknown_height_and_a_counter_that_vanishes_leave_their_sample_out(tmp_path: Path) -> None:
    root = write(tmp_path, rapl("0", "package-0", 9_000_000))
    folder = root / "class/powercap/intel-rapl:0"
    (folder / "max_energy_range_uj").unlink()
    meter = Meter(root)
    meter.sample(0.0)
    for at, energy in ((1.0, 3_000_000), (2.0, 5_000_000), (3.0, None), (4.0, 50_000_000), (5.0, 51_000_000)):
        if energy is None:
            (folder / "energy_uj").unlink()
        else:
            write(folder, {"energy_uj": energy})
        meter.sample(at)
    # 0 to 1 wrapped, 2 to 4 was not there.
    assert meter.power == [(2.0, 2.0), (5.0, 1.0)] and meter.to_json()["energy_j"] == 3.0


def test_counters_for_root_alone_give_way_to_the_next_source(tmp_path: Path) -> None:
    # A folder cannot be read as a file, whoever asks.
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").mkdir(parents=True)
    root = write(tmp_path, {"class/hwmon/hwmon1/name": "amdgpu", "class/hwmon/hwmon1/power1_average": 7_500_000})
    meter = Meter(root)
    for at in (0.0, 1.0):
        meter.sample(at)
    assert meter.to_json()["power_w"] == {"mean": 7.5, "max": 7.5} and meter.power_source == "hwmon: amdgpu"


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    root = write(tmp_path, rail(1, "VDD_CPU", 5000, 400) | rail(2, "VDD_GPU", 5000, 600) | rail(3, "NC", 5000, 9000))
    meter = Meter(root)
    meter.sample(0.0)
    assert meter.power == [(0.0, 5.0)] and meter.power_source == "ina3221: VDD_CPU, VDD_GPU"
    assert meter.to_json() == NOTHING  # a single moment is no mean
    write(root, rail(2, "VDD_GPU", 5000, 1000))
    meter.sample(2.0)
    assert meter.to_json()["energy_j"] == 12.0
    # The rail that feeds the others stands for all.
    meter = Meter(write(root, rail(3, "VDD_IN", 5000, 3000)))
    meter.sample(0.0)
    assert meter.power == [(0.0, 15.0)] and meter.power_source == "ina3221: VDD_IN"


def test_one_rail_less_is_no_sample(tmp_path: Path) -> None:
    root = write(tmp_path, rail(1, "VDD_CPU", 5000, 400) | rail(2, "VDD_GPU", 5000, 600))
    meter = Meter(root)
    meter.sample(0.0)
    write(root, {"class/hwmon/hwmon3/curr2_input": "garbage"})
    meter.sample(1.0)
    write(root, rail(2, "VDD_GPU", 5000, 600))
    meter.sample(2.0)
    meter.sample(3.0)
    assert [at for at, _ in meter.power] == [0.0, 2.0, 3.0] and meter.to_json()["energy_j"] == 5.0


def test_the_whole_machine_s_meter_comes_alone(tmp_path: Path) -> None:
    files = {"class/hwmon/hwmon0/name": "nvme", "class/hwmon/hwmon0/power1_input": 1_000_000}
    files |= {"class/hwmon/hwmon1/name": "power_meter", "class/hwmon/hwmon1/power1_average": 90_000_000}
    meter = Meter(write(tmp_path, files))
    meter.sample(0.0)
    assert meter.power == [(0.0, 90.0)] and meter.power_source == "hwmon: power_meter"


def test_a_battery_counts_while_it_empties(tmp_path: Path) -> None:
    base = "class/power_supply/battery"
    files = {f"{base}/type": "Battery", f"{base}/status": "Discharging"}
    root = write(tmp_path, files | {f"{base}/current_now": -500_000, f"{base}/voltage_now": 4_000_000})
    meter = Meter(root)
    meter.sample(0.0)
    meter.sample(1.0)
    write(root, {f"{base}/status": "Charging"})
    meter.sample(2.0)
    assert meter.power == [(0.0, 2.0), (1.0, 2.0)] and meter.to_json()["energy_j"] == 2.0
    assert Meter(root).power_source is None


def test_the_hottest_sensor_of_the_processor(tmp_path: Path) -> None:
    zones = {"class/thermal/thermal_zone0/type": "soc", "class/thermal/thermal_zone0/temp": 41_000}
    zones |= {"class/thermal/thermal_zone1/type": "off", "class/thermal/thermal_zone1/temp": -274_000}
    root = write(tmp_path, zones)
    meter = Meter(root)
    meter.sample(0.0)
    assert meter.celsius == [(0.0, 41.0)]
    core = {"class/hwmon/hwmon0/name": "coretemp", "class/hwmon/hwmon1/name": "nvme"}
    core |= {"class/hwmon/hwmon0/temp1_input": 50_000, "class/hwmon/hwmon0/temp1_label": "Package id 0"}
    core |= {"class/hwmon/hwmon0/temp2_input": 55_500, "class/hwmon/hwmon1/temp1_input": 80_000}
    meter = Meter(write(root, core))
    meter.sample(0.0)
    write(root, {"class/hwmon/hwmon0/temp2_input": 70_000})
    meter.sample(1.0)
    (root / "class/hwmon/hwmon0/temp2_input").unlink()
    meter.sample(2.0)
    found = meter.to_json()
    assert found["temperature_c"] == {"begin": 55.5, "end": 50.0, "max": 70.0}
    assert found["sensors"]["temperature"] == "hwmon: coretemp Package id 0, coretemp"


def test_it_samples_by_itself_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "EVERY_S", 0.01)
    root = write(tmp_path, {"class/thermal/thermal_zone0/temp": 41_000})
    seen = []

    class Watched(Meter):
        def sample(self, at: float) -> None:
            super().sample(at)
            seen.append(at)
            if len(seen) == 3:
                write(root, {"class/thermal/thermal_zone0/temp": 47_000})
                self._ended.set()

    with Watched(root) as meter:
        assert meter._thread is not None
        meter._thread.join()
    assert len(seen) == 4 and seen == sorted(seen)
    assert meter.to_json()["temperature_c"] == {"begin": 41.0, "end": 47.0, "max": 47.0}
