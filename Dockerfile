# Training image on NVIDIA's PyTorch image, which brings PyTorch, Transformer Engine, flash-attn and
# NVIDIA's apex, built for each other; requirements-gpu.txt adds the rest and touches none of them.
#
#   docker build -t megatron-diffusion .
#   docker run --gpus all --ipc host -v /shared:/shared megatron-diffusion \
#       bash examples/launch/single_node.sh --help
ARG NGC_PYTORCH=26.01-py3
FROM nvcr.io/nvidia/pytorch:${NGC_PYTORCH}
WORKDIR /workspace/megatron-diffusion
COPY requirements-gpu.txt .
# The image pins what it has built in a constraint file that pip reads by itself.
RUN python -m pip install --no-cache-dir -r requirements-gpu.txt
COPY . .
ENV PYTHONPATH=/workspace/megatron-diffusion
CMD ["bash"]
