"""``python -m prequant`` is the command ``prequant``, for launchers such as torchrun that start modules."""

from prequant.cli import app

if __name__ == "__main__":
    app(prog_name="prequant")
