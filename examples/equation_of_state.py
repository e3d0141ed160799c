"""Bulk moduli of the metals that ASE's EMT calculator supports, from energy-volume curves.

    python examples/equation_of_state.py             # all seven metals
    python examples/equation_of_state.py Cu Ag       # some of them

Every point of a curve is a call of its own. A fit takes the futures of its points as input, so it
starts as soon as they are there, and nothing here waits for anything. The fine curve that the
pressure derivative of B needs is one call on two MPI ranks, which share out its points.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import as_completed
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.eos import EquationOfState, birchmurnaghan
from ase.optimize import FIRE
from ase.units import GPa

from executorlib import SingleNodeExecutor, get_item_from_future

# Lattice constant in Angstrom and isothermal bulk modulus in GPa, both at room temperature.
SOURCE = "C. Kittel, Introduction to Solid State Physics, 8th ed. (2005), ch. 1 and 3, table 3 each"
EXPERIMENT = {
    "Cu": (3.61, 137.0),
    "Ag": (4.09, 100.7),
    "Au": (4.08, 173.2),
    "Ni": (3.52, 186.0),
    "Pd": (3.89, 180.8),
    "Pt": (3.92, 278.3),
    "Al": (4.05, 72.2),
}
STRAINS = np.linspace(-0.03, 0.02, 7)  # of the experimental lattice constant
FINE_STRAINS = np.linspace(-0.03, 0.02, 12)

Point = tuple[float, float]  # volume in Angstrom^3 and energy in eV, both per atom
Fit = dict[str, float]


def energy(metal: str, strain: float, cells: int) -> Point:
    """Relax atoms, displaced at random, in a cube of `cells` unit cells along each edge, strained by `strain`."""
    atoms = bulk(metal, a=EXPERIMENT[metal][0] * (1 + strain), cubic=True) * (cells, cells, cells)
    atoms.rattle(stdev=0.05, seed=0)
    atoms.calc = EMT()
    FIRE(atoms, logfile=None).run(fmax=0.02)
    return atoms.get_volume() / len(atoms), atoms.get_potential_energy() / len(atoms)


def energies_on_ranks(metal: str, strains: np.ndarray, cells: int) -> list[Point]:
    """Share out the points among the ranks of an MPI world and return all of them on each."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    mine = [energy(metal, strain, cells) for strain in strains[world.rank :: world.size]]
    return sorted(point for points in world.allgather(mine) for point in points)


def fit(points: list[Point]) -> Fit:
    """Fit the Birch-Murnaghan equation of state: e0 in eV, v0 in Angstrom^3, b in GPa, b_prime."""
    equation = EquationOfState(*zip(*points, strict=True), eos="birchmurnaghan")
    equation.fit(warn=False)
    e0, b, b_prime, v0 = equation.eos_parameters
    return {"e0": e0, "v0": v0, "b": b / GPa, "b_prime": b_prime}


def run_in_parallel(metals: list[str], cells: int) -> tuple[dict[str, list[Point]], dict[str, Fit], Fit]:
    """Submit everything at once and report progress until all of it is done."""
    # Each call gets a fresh process; what is preloaded need not be imported again in each of them.
    preload = ["ase.build", "ase.calculators.emt", "ase.eos", "ase.optimize"]
    with SingleNodeExecutor(preload=preload) as executor:
        # On several ranks a call returns a list of what each rank returned.
        two = {"cores": 2}
        ranks = executor.submit(energies_on_ranks, metals[0], FINE_STRAINS, cells, resource_dict=two)
        fine_fit = executor.submit(fit, get_item_from_future(ranks, 0))
        curves = {m: [executor.submit(energy, m, strain, cells) for strain in STRAINS] for m in metals}
        fits = {m: executor.submit(fit, curve) for m, curve in curves.items()}

        waiting = [ranks, fine_fit, *chain(*curves.values()), *fits.values()]
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()  # raises what a call raised as soon as it did
            if done % 10 == 0 or done == len(waiting):
                print(f"  {done} of {len(waiting)} calls done", flush=True)
        points = {m: [future.result() for future in curve] for m, curve in curves.items()}
        return points, {m: future.result() for m, future in fits.items()}, fine_fit.result()


def run_serially(metals: list[str], cells: int) -> None:
    """Do the same work in this process, call after call."""
    fit([energy(metals[0], strain, cells) for strain in FINE_STRAINS])
    for metal in metals:
        fit([energy(metal, strain, cells) for strain in STRAINS])


def plot(curves: dict[str, list[Point]], fits: dict[str, Fit], filename: str) -> None:
    """Draw the energy of each metal over its volume, both relative to the fitted minimum."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for metal, f in sorted(fits.items(), key=lambda item: -item[1]["b"] * item[1]["v0"]):
        volumes, energies = np.array(curves[metal]).T
        smooth = np.linspace(volumes.min(), volumes.max(), 200)
        model = birchmurnaghan(smooth, f["e0"], f["b"] * GPa, f["b_prime"], f["v0"])
        (line,) = axes.plot(smooth / f["v0"], 1000 * (model - f["e0"]), linewidth=1)
        style = {"color": line.get_color(), "label": f"{metal}, B = {f['b']:.0f} GPa"}
        axes.plot(volumes / f["v0"], 1000 * (energies - f["e0"]), "o", **style)
    axes.set(xlabel="volume / equilibrium volume", ylabel="energy above the minimum (meV/atom)")
    axes.legend(frameon=False)
    figure.savefig(filename, dpi=150)


def main() -> None:
    """Run the parallel and the serial version and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metals", nargs="*", metavar="METAL", help="of " + ", ".join(EXPERIMENT))
    parser.add_argument("--cells", type=int, default=3, help="unit cells along each edge, of four atoms each")
    parser.add_argument("--output", default="equation_of_state.png", help="the picture to write")
    arguments = parser.parse_args()
    metals = arguments.metals or list(EXPERIMENT)
    if unknown := set(metals) - set(EXPERIMENT):
        parser.error(f"no data for {', '.join(unknown)}; there are {', '.join(EXPERIMENT)}")

    print("With executorlib:")
    start = time.perf_counter()
    curves, fits, fine_fit = run_in_parallel(metals, arguments.cells)
    parallel = time.perf_counter() - start
    print("The same work in one process ...", flush=True)
    start = time.perf_counter()
    run_serially(metals, arguments.cells)
    serial = time.perf_counter() - start

    print("\n        a (Angstrom)       B (GPa)")
    print("metal   EMT    exp.     EMT    exp.")
    for metal, f in fits.items():
        a, b = EXPERIMENT[metal]
        print(f"{metal:5} {(4 * f['v0']) ** (1 / 3):5.2f}  {a:6.2f}  {f['b']:6.1f}  {b:6.1f}")
    print(f"exp.: {SOURCE}")
    print(f"\n{metals[0]} from {len(FINE_STRAINS)} points on two MPI ranks: ", end="")
    print(f"B = {fine_fit['b']:.1f} GPa, dB/dp = {fine_fit['b_prime']:.2f}")
    plot(curves, fits, arguments.output)
    print(f"Curves drawn in {arguments.output}")
    ratio = serial / parallel
    print(f"{parallel:.1f} s; one process took {serial:.1f} s, {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
