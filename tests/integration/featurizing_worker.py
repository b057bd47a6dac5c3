"""A worker for the chaos test: ``python featurizing_worker.py URI DATABASE``."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    import pymongo

    from nanoos_fw.firetasks import featurization
    from nanoos_fw.stores.database import Patience
    from nanoos_fw.stores.structures import StructureStore

    uri, name = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    # Give up soon, so that the worker's own patience is what carries it through.
    database = pymongo.MongoClient(uri, serverSelectionTimeoutMS=500)[name]
    featurization._JOB_STRUCTURES = 20  # many moments at which to be killed
    # The server may be away when a worker starts, too.
    keys = Patience().run(lambda: StructureStore(database).keys("chaos"))
    featurization.compute_features(database, keys)


if __name__ == "__main__":
    main()
