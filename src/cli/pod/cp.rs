//! `pod cp`: files and folders to and from a pod.

use std::path::PathBuf;

use clap::Args;

use crate::app::{self, AppOptions};
use crate::cli::output;
use crate::cli::render::clean;
use crate::cli::signals::interruptible;
use crate::errors::chain;
use crate::ssh::CopyError;
use crate::tools::{ErrorKind, StillBilling, ToolError, reach_pod};

/// Copy files and folders to and from a pod
///
/// One side is `POD:PATH`, the other a path of this machine. A folder that is there is copied into, like `cp -r`
/// does. A file is there whole or not at all; a folder that was cut short is left as far as it came.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// What to copy: a path, or `POD:PATH`.
    #[arg(value_name = "SRC")]
    from: String,
    /// Where to: `POD:PATH`, or a path.
    #[arg(value_name = "DST")]
    to: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq)]
enum Side<'a> {
    /// The pod may be left out when there is only one: `:PATH`.
    Pod(Option<&'a str>, &'a str),
    Here(PathBuf),
}

impl<'a> Side<'a> {
    /// A path with a colon of its own is written with a slash before it, as `./a:b`.
    fn of(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((pod, path)) if !pod.contains('/') => Self::Pod(Some(pod).filter(|pod| !pod.is_empty()), path),
            _ => Self::Here(PathBuf::from(text)),
        }
    }
}

pub(super) async fn run(options: &AppOptions, args: CpArgs) -> Result<u8, ToolError> {
    let (from, to) = (Side::of(&args.from), Side::of(&args.to));
    let (pod, path) = match (&from, &to) {
        (Side::Here(_), Side::Pod(pod, path)) | (Side::Pod(pod, path), Side::Here(_)) => (*pod, *path),
        _ => {
            return Err(ToolError::invalid("SRC DST", "expected one of the two to be `POD:PATH`")
                .hint("write a path of this machine that holds a colon as `./a:b`"));
        }
    };
    if path.is_empty() {
        return Err(ToolError::invalid("SRC DST", "expected a path behind the pod's name, like `comfy:/workspace`"));
    }
    let (pod, written) = interruptible(async {
        let services = app::services(options).await?;
        let (pod, target) = reach_pod(&services, pod).await?;
        if let Side::Here(from) = &from {
            services.ssh.send(&target, from, path).await?;
        }
        let written = match &to {
            Side::Here(to) => services.ssh.fetch(&target, path, to).await?.display().to_string(),
            Side::Pod(..) => path.to_owned(),
        };
        Ok((pod, written))
    })
    .await?;
    let place = if matches!(to, Side::Here(_)) { written } else { format!("{pod}:{written}") };
    output::say(&clean(&format!("Copied to {place}")));
    Ok(0)
}

impl From<CopyError> for ToolError {
    fn from(error: CopyError) -> Self {
        let kind = match error {
            CopyError::Ssh(cause) => return cause.into(),
            CopyError::NotFound(_) => ErrorKind::NotFound,
            CopyError::Local { ref source, .. } if source.kind() == std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            CopyError::Cut => ErrorKind::Network,
            CopyError::NoFile(_) => ErrorKind::InvalidInput,
            CopyError::Local { .. } | CopyError::Pod(_) | CopyError::Unsafe(_) => ErrorKind::Failed,
        };
        Self::new(kind, chain(&error)).billing(StillBilling::Possible)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_stands_before_the_first_colon() {
        assert_eq!(Side::of("comfy:/a:b"), Side::Pod(Some("comfy"), "/a:b"));
        assert_eq!(Side::of(":/a"), Side::Pod(None, "/a"));
        for here in ["./a:b", "/x/a:b", "plain", ""] {
            assert_eq!(Side::of(here), Side::Here(here.into()));
        }
    }
}
