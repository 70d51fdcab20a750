// Draws samples in C++ from a whole-loop file, with one call of ONNX Runtime, and writes them as a .npy file.
//
//     python -m export.to_onnx runs/NAME/champion --whole-loop --in-graph-noise --output from-seed.onnx
//     g++ -std=c++17 -O2 -I INCLUDE examples/whole_loop.cpp LIBRARY -Wl,-rpath,LIBRARY_FOLDER -o whole_loop
//     ./whole_loop from-seed.onnx 16 0 samples.npy [LABEL]
//
// INCLUDE has onnxruntime_cxx_api.h, and LIBRARY is libonnxruntime.so: docs/whole-loop.md says from where.
// A model with classes needs the number of one, LABEL.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

// Writes a float32 file of numpy.save, format 1.0.
void write_npy(const std::string& path, const float* values, const std::vector<int64_t>& shape) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  size_t count = 1;
  for (int64_t side : shape) {
    header += std::to_string(side) + ", ";
    count *= static_cast<size_t>(side);
  }
  header += "), }";
  header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ').push_back('\n');
  std::ofstream file(path, std::ios::binary);
  const unsigned char start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<unsigned char>(header.size() & 255),
                                 static_cast<unsigned char>(header.size() >> 8)};
  file.write(reinterpret_cast<const char*>(start), sizeof start);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file) throw std::runtime_error(path + " cannot be written");
}

int main(int argc, char** argv) try {
  if (argc != 5 && argc != 6) {
    std::cerr << "usage: whole_loop from-seed.onnx NUM_SAMPLES SEED samples.npy [LABEL]\n";
    return 2;
  }
  int64_t num_samples = std::stoll(argv[2]);
  int64_t seed = std::stoll(argv[3]);
  std::vector<int64_t> labels(static_cast<size_t>(num_samples), argc == 6 ? std::stoll(argv[5]) : 0);

  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "whole_loop");
  Ort::Session session(environment, argv[1], Ort::SessionOptions());

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t batch[] = {num_samples};
  std::vector<const char*> names = {"num_samples", "seed"};
  std::vector<Ort::Value> inputs;
  inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, &num_samples, 1, nullptr, 0));
  inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, &seed, 1, nullptr, 0));
  if (argc == 6) {
    names.push_back("y");
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, labels.data(), labels.size(), batch, 1));
  }
  const char* outputs[] = {"samples"};
  auto results = session.Run(Ort::RunOptions(), names.data(), inputs.data(), inputs.size(), outputs, 1);

  auto shape = results[0].GetTensorTypeAndShapeInfo().GetShape();
  write_npy(argv[4], results[0].GetTensorData<float>(), shape);
  std::cout << argv[4] << ": " << shape[0] << " samples\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
