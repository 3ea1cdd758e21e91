"""What `derive` makes of several hundred models that people train: captured, right about what grows, right about the exponents.

    python -m tests.survey --zoo /path/to/zoo          # all of it; rows that results.json has already are not run again
    python -m tests.survey --family torchvision --only resnet --again

`cases.py` says which models, `oracle.py` what is right (from shapes at several widths, without `scaling`), `row.py` what is
compared, `__main__.py` runs each model in a process of its own and writes `results.json`. Nothing is downloaded: weights are random.
"""
