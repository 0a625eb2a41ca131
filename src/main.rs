//! argv, environment, exit code; nothing else.

fn main() -> std::process::ExitCode {
    autopod_mcp::cli::main()
}
