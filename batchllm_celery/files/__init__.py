"""Input files as rows, and result files: for the commands, and for programs of your own."""

from batchllm_celery.files.prompt_template import PromptTemplate
from batchllm_celery.files.result_file import OutputError, ResultFile
from batchllm_celery.files.rows import Rows
from batchllm_celery.files.tables import table_rows, write_table

__all__ = ["OutputError", "PromptTemplate", "ResultFile", "Rows", "table_rows", "write_table"]
