"""One file a job: ``clipmill NAME`` or ``python -m jobs.NAME``. Only the jobs know the order of the stages."""

import sys

from pipeline.lean import import_arrow_without_pandas

if sys.argv[:1] == ["-m"]:  # so it reads while Python looks for the module that it is to run: this one, jobs.NAME
    import_arrow_without_pandas()
