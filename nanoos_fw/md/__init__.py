"""Molecular dynamics through LAMMPS: potentials, engine, trajectories: pure science."""
