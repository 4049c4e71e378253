"""A custom logger: a hook that writes logged values and scores to a CSV file.

python examples/own_logger.py --out runs/logged
"""

import argparse

import fastrm


class CSV:
    """Appends a line ``step,name,value`` per number to log.csv in the run's folder."""

    def on_start(self, run):
        self.path = run.out / "log.csv"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if run.rank == 0:  # a continued run drops the lines after its checkpoint
            self.path.write_text("".join(f"{line}\n" for line in lines if int(line.split(",")[0]) <= run.step))

    def on_log(self, run, step, values):
        if run.rank == 0:
            with open(self.path, "a") as file:
                file.writelines(f"{step},{name},{value}\n" for name, value in values.items())

    on_evaluate = on_log


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--out", default="runs/logged")
    small = {
        "arch": "test_resnet",
        "image_size": 32,
        "batch_size": 128,
        "epochs": 10,
        "hidden_dim": 512,
        "log_every": 1,
    }
    fastrm.pretrain("digits", hooks=[CSV()], **small, **vars(parser.parse_args()))
