"""ML-accelerated materials screening on SLURM with FireWorks.

Import the rooms you need (``nanoos_fw.ml``, ``nanoos_fw.md``, ``nanoos_fw.stores``);
this module stays empty so that ``import nanoos_fw`` and the command line are fast.
"""

__version__ = "0.1.0"
