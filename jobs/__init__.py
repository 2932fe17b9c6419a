"""One file a job: ``clipmill NAME`` or ``python -m jobs.NAME``. Only the jobs know the order of the stages."""
