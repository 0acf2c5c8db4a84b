"""One HTML page about a quantized model: what was done, what it weighs, what it sounds like.

`gather` runs the model, `write_report` writes the page; between them stands `Report`, plain data.
"""

from ptq4adm.report.data import Report, Sample, SizeRow, Take
from ptq4adm.report.gather import gather
from ptq4adm.report.page import render, write_report

__all__ = ["Report", "Sample", "SizeRow", "Take", "gather", "render", "write_report"]
