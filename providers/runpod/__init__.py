"""RunPod Serverless: `provider` asks and judges, the rest is the transport of queue endpoints.

A request becomes a job (`input`), is submitted, looked at and stopped (`call`, at the pace of
`pace`), and what the job says (`job`) becomes a document (`answer`) or a stream (`events`).
"""

from .provider import RunPod

__all__ = ["RunPod"]
