"""Seeing a Program: a page that shows its graph, its weights and what each pass changed; and pictures of it.

``Recorder`` watches a pipeline and collects what there is to show, ``write_page`` makes one HTML file of it that needs
no network, ``write_picture`` an SVG, PNG or DOT file.
"""

from .page import page, write_page
from .pictures import COLOURINGS, FORMATS, PictureError, check_format, write_picture
from .record import NodeRecord, Record, Stage, WeightRecord
from .recorder import Recorder, record_of

__all__ = [
    "COLOURINGS",
    "FORMATS",
    "NodeRecord",
    "PictureError",
    "Record",
    "Recorder",
    "Stage",
    "WeightRecord",
    "check_format",
    "page",
    "record_of",
    "write_page",
    "write_picture",
]
